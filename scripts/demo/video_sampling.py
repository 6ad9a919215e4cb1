"""The page: a picture, some options, a video: ``streamlit run scripts/demo/video_sampling.py``.

Its widgets are made from the options' descriptions, and its runs are the command line's. What an
operator allows on it is in a file: ``streamlit run scripts/demo/video_sampling.py -- --settings
FILE`` (docs/demo.md).
"""

import sys
from pathlib import Path

import streamlit as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.demo.arguments import settings_file
from scripts.demo.page.layout import show_page
from scripts.demo.page.session import errors_in_one_line, open_studio

# Streamlit's own sign that the script is at work would flicker with every look at a run, and its
# "Stop" would not stop that.
STYLE = "<style>[data-testid=stStatusWidget] {display: none}</style>"


def main() -> None:
    """Draw the page."""
    st.set_page_config("Stable Video Diffusion", "🎞️", layout="wide")
    st.html(STYLE)
    st.title("A picture becomes a video")
    with errors_in_one_line():
        show_page(open_studio(settings_file()))


if __name__ == "__main__":
    main()
