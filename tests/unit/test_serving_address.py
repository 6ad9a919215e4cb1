"""Settings go into an address and come back; what a stranger writes there does no harm."""

import random
from urllib.parse import parse_qsl, urlencode

import pytest

from sgm.inference.options import SamplingOptions, option_fields
from sgm.serving.address import from_query, to_query

PRIVATE = {"files", "path", "device"}
CARRIED = [
    option
    for option in option_fields()
    if option.metadata["kind"] not in PRIVATE and option.metadata["group"] != "python"
]


def some_value(option, draw):
    """A value that the option takes, other than its default, drawn as widely as it goes."""
    meta = option.metadata

    def number():
        return draw.choice([meta["min"], meta["max"], draw.uniform(meta["min"], meta["max"])])

    kinds = {
        "integer": lambda: draw.choice(
            [meta["min"], meta["max"], draw.randint(meta["min"], meta["max"])]
        ),
        "number": number,
        "numbers": lambda: tuple(float(number()) for _ in range(draw.randint(1, 30))),
        "choice": lambda: draw.choice(meta["choices"]),
        "colour": lambda: draw.choice(["#12ab34", "red", "hsl(120, 50%, 25%)", "white"]),
        "switch": lambda: draw.choice([True, False]),
    }
    return kinds[meta["kind"]]()


@pytest.mark.parametrize("option", CARRIED, ids=lambda option: option.name)
def test_every_option_comes_back_as_it_was(option):
    """Catches: rounded numbers, lists that lose an angle, a kind that has no text."""
    draw = random.Random(option.name)
    for _ in range(20):
        options = SamplingOptions(**{option.name: some_value(option, draw)})
        address = urlencode(to_query("svd", options))
        version, values, complaints = from_query(dict(parse_qsl(address)))
        assert (version, complaints) == ("svd", [])
        assert SamplingOptions(**values) == options
        assert values.keys() <= {option.name}  # and no more than was changed


def test_defaults_make_a_short_address():
    assert to_query("svd_tiny", SamplingOptions()) == {"version": "svd_tiny"}
    assert to_query("svd", SamplingOptions(seed=7, cond_aug=0.1)) == {
        "version": "svd",
        "seed": "7",
        "cond_aug": "0.1",
    }


def test_no_path_and_no_device_goes_either_way():
    """Catches: a link that makes the host read a file, or use another device."""
    named = {"lora": "/etc/passwd", "device": "cuda:1", "output": "latents"}
    paths = {o.name: "/etc/passwd" for o in option_fields() if o.metadata["kind"] in PRIVATE}
    host = {"config": "/etc/passwd", "ckpt_path": "owner/name", "output_folder": "/", "repeat": "x"}
    assert from_query(named | paths | host) == (None, {}, [])
    options = SamplingOptions(lora=("private.safetensors",), device="cuda:1", output="latents")
    assert to_query("svd", options) == {"version": "svd"}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("version", "svd_huge", "version must be one of svd_xt"),
        ("version", "x" * 10**6, "version must be one of svd_xt"),
        ("seed", "-1", "seed must be an integer from 0 to 2^63 - 1, got -1"),
        ("seed", "two", "seed must be an integer from 0 to 2^63 - 1, got 'two'"),
        ("num_steps", "9" * 5000, "num_steps must be an integer from 1 to 1000, got "),
        ("cond_aug", "nan", "cond_aug must be a number from 0 to 10, got nan"),
        ("fit", "<script>\n", "fit must be one of cover, contain, stretch, got "),
        ("azimuths_deg", "0,north", "azimuths_deg must be a number or a list of them"),
        ("background", "x" * 10**6, "background must be a colour"),
    ],
)
def test_a_bad_value_is_left_out_with_one_line(name, text, complaint):
    """Catches: a good value lost with a bad one, an address repeated in full on the page."""
    version, values, complaints = from_query({"fps": "9", name: text, "unknown": "1"})
    assert (version, values) == (None, {"fps": 9})
    (line,) = complaints
    assert line.startswith(complaint)
    assert "\n" not in line
    assert len(line) <= 300


def test_no_address_raises():
    """Catches: whatever a robot tries: each text for each name, none of them an exception."""
    texts = ["", " ", "None", "True", "[", "1e999", "1_0", "٣", "\x00", "-0", "0x10", ",,", "🎥"]
    texts += ["rgb(1,2)", "hsv(", "#", "1" * 400, "inf,nan", "torch.float16", "../..", "a\nb"]
    for option in option_fields():
        for text in texts:
            _, values, complaints = from_query({option.name: text, "version": text})
            SamplingOptions(**values)
            assert all(isinstance(line, str) and line for line in complaints)
