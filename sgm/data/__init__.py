"""Data: photographs and videos as training clips, and the measures of a clip's motion."""
