"""The named models: which YAML, which weights, and what to do where neither YAML nor flag says.

Precedence everywhere: a flag, else the YAML, else the row of this table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parents[1]

# Nothing of it is repeated in other words: whoever uses the weights has to read it.
STABILITY_LICENCE = (
    "Stability AI's own, which restricts use, above all commercial: https://stability.ai/license"
)


@dataclass(frozen=True)
class ModelSpec:
    """One named model.

    Attributes:
        name: what ``--version`` takes; also the stem of its YAML and of its weights.
        parameters: numbers in its file.
        num_frames: frames it was trained for.
        height: native height in pixels.
        width: native width in pixels.
        num_steps: sampling steps.
        guidance_shape: course of the guidance over the frames.
        min_guidance: lowest guidance.
        max_guidance: highest guidance.
        cond_aug: standard deviation of the noise on the condition picture.
        decoding_t: frames decoded at once.
        orbit: the camera circles an object (SV3D): the picture's object is cut out, the condition
            picture is the last frame, and pixels take the place of a scene.
        about: one line for people who choose.
        repository: where it is published on the Hugging Face hub; None for what comes with this
            project.
        published: its file there; by default NAME.safetensors.
        pipeline: the repository also holds it as a diffusers pipeline, which is half the size.
        base: the model whose weights it takes, but for the U-Net, which is all that its own file
            holds.
        licence: of its weights, in words.
    """

    name: str
    parameters: int
    num_frames: int
    height: int
    width: int
    num_steps: int
    min_guidance: float
    max_guidance: float
    about: str
    guidance_shape: str = "linear"
    cond_aug: float = 0.02
    decoding_t: int = 14
    orbit: bool = False
    repository: str | None = None
    published: str | None = None
    pipeline: bool = False
    base: str | None = None
    licence: str = STABILITY_LICENCE

    @property
    def file(self) -> str:
        """Name of its file, as published."""
        return self.published or f"{self.name}.safetensors"

    @property
    def aliases(self) -> tuple[str, ...]:
        """Names that its files and folders have: its own, its file's and its repository's.

        Also its own without the decoder's kind, which the keys tell.
        """
        repository = (self.repository or self.name).rpartition("/")[2]
        file = self.file.removesuffix(".safetensors")
        return self.name, self.name.removesuffix("_image_decoder"), file, repository

    @property
    def checkpoint(self) -> Path | None:
        """The weights under ``checkpoints/`` of the working directory or the checkout, if there.

        A file NAME.safetensors or NAME.ckpt, or the folder NAME of a diffusers pipeline. None also
        where the weights of ``base`` are not there.
        """
        if self.base and SPECS[self.base].checkpoint is None:
            return None
        names = f"{self.name}.safetensors", f"{self.name}.ckpt", f"{self.name}/unet"
        found = (find_path(Path("checkpoints") / name) for name in names)
        return next((p.parent if p.name == "unet" else p for p in found if p), None)


_HUB = "stabilityai/stable-video-diffusion-img2vid"


# Published files with the temporal decoder, and with the one that takes frames one by one.
_VIDEO_DECODER, _IMAGE_DECODER = 2_389_819_785, 2_375_730_873


def _svd(name: str, about: str, parameters: int = _VIDEO_DECODER) -> ModelSpec:
    pipeline = parameters == _VIDEO_DECODER
    shape = 14, 576, 1024, 25, 1.0, 2.5
    return ModelSpec(name, parameters, *shape, about, repository=_HUB, pipeline=pipeline)


def _xt(name: str, about: str, suffix: str = "-xt", parameters: int = _VIDEO_DECODER) -> ModelSpec:
    pipeline = parameters == _VIDEO_DECODER
    shape = 25, 576, 1024, 30, 1.5, 3.0
    return ModelSpec(name, parameters, *shape, about, repository=_HUB + suffix, pipeline=pipeline)


def _sv3d(name: str, about: str, parameters: int) -> ModelSpec:
    return ModelSpec(
        name,
        parameters,
        *(21, 576, 576, 50, 1.0, 2.5),
        about,
        guidance_shape="triangle",
        cond_aug=1e-5,
        orbit=True,
        repository="stabilityai/sv3d",
    )


# In the order of preference: the first whose weights are there is the default.
SPECS = {
    spec.name: spec
    for spec in (
        _xt("svd_xt", "25 frames of 576x1024"),
        _svd("svd", "14 frames of 576x1024"),
        ModelSpec(
            "svd_tiny",
            19_007_214,
            *(14, 64, 64, 25, 1.0, 2.0),
            "14 frames of 64x64, bundled",
            licence="MIT, as this project",
        ),
        _xt("svd_xt_1_1", "25 frames of 576x1024, tuned at 6 frames/s and motion 127", "-xt-1-1"),
        _svd(
            "svd_image_decoder", "svd with a decoder that takes frames one by one", _IMAGE_DECODER
        ),
        _xt(
            "svd_xt_image_decoder",
            "svd_xt with a decoder that takes frames one by one",
            parameters=_IMAGE_DECODER,
        ),
        _sv3d("sv3d_u", "21 views around an object, 576x576", 2_340_911_829),
        _sv3d("sv3d_p", "21 views around an object, 576x576, camera path given", 2_342_222_549),
        ModelSpec(
            "svd_xt_lcm",
            1_524_623_082,
            *(25, 576, 1024, 4, 1.0, 1.2),
            "25 frames of 576x1024 in 2 to 8 steps, without guidance",
            guidance_shape="none",
            repository="wangfuyun/AnimateLCM-SVD-xt",
            published="AnimateLCM-SVD-xt.safetensors",
            base="svd_xt",
            licence=f"the publisher's, and that of svd_xt: {STABILITY_LICENCE}",
        ),
    )
}


def get_spec(name: str) -> ModelSpec:
    """Look a model up.

    Raises:
        ValueError: unknown name.
    """
    if name not in SPECS:
        raise ValueError(f"version must be one of {', '.join(SPECS)}; got {name!r}")
    return SPECS[name]


def default_spec() -> ModelSpec:
    """The first model of the table whose weights are present.

    Raises:
        ValueError: none is.
    """
    for spec in SPECS.values():
        if spec.checkpoint is not None:
            return spec
    raise ValueError(
        "no weights found: put one of "
        f"{', '.join(f'{name}.safetensors' for name in SPECS)} under checkpoints/, or fetch one "
        "with 'python scripts/download.py NAME'"
    )


def find_file(path: str | Path) -> Path | None:
    """Find a file of the project, such as ``configs/svd.yaml``.

    Looks in the working directory, the checkout and the installed package, in that order.
    """
    return next((base for base in _candidates(Path(path)) if base.is_file()), None)


def find_path(path: str | Path) -> Path | None:
    """Find a file or a folder, in the places of `find_file`."""
    return next((base for base in _candidates(Path(path)) if base.exists()), None)


def find_config(name: str) -> Path:
    """Find the YAML of a named model.

    Raises:
        ValueError: there is none; the places that were searched are named.
    """
    relative = Path("configs") / f"{name}.yaml"
    found = find_file(relative)
    if found is None:
        places = ", ".join(str(path.parent) for path in _candidates(relative))
        raise ValueError(f"there is no {name}.yaml in {places}")
    return found


def _candidates(path: Path) -> Iterator[Path]:
    if path.is_absolute():
        yield path
        return
    for base in (Path.cwd(), ROOT, PACKAGE):
        yield base / path
