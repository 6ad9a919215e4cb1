"""The layouts that are known, and ways between any two of them."""

from collections.abc import Callable
from dataclasses import dataclass

from sgm.convert import diffusers, mindspore
from sgm.convert.conversion import Conversion, Entry, Shapes


@dataclass(frozen=True)
class Layout:
    """A layout beside the native one.

    Attributes:
        recognises: whether tensors of such names and shapes are in this layout.
        to_native: from this layout; its second argument is ``partial``, see :func:`plan`.
        from_native: to this layout, likewise.
    """

    recognises: Callable[[Shapes], bool]
    to_native: Callable[[Shapes, bool], Conversion]
    from_native: Callable[[Shapes, bool], Conversion]


NATIVE = "native"
# A further layout is one line here. They are asked in this order, and the native one last: another
# layout may use native names for a part of its tensors.
LAYOUTS = {
    "diffusers": Layout(diffusers.recognises, diffusers.to_native, diffusers.from_native),
    "mindspore": Layout(mindspore.recognises, mindspore.to_native, mindspore.from_native),
}
_NATIVE_PARTS = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.")


def detect(shapes: Shapes) -> str:
    """Tell the layout of a checkpoint.

    Args:
        shapes: shapes of its tensors by name; those of a diffusers folder begin with the part,
            ``unet/``, ``vae/`` or ``image_encoder/`` (:func:`sgm.convert.folder_part` tells which).

    Returns:
        A name that :func:`plan` takes: ``native``, or one of ``LAYOUTS``.

    Raises:
        ValueError: these are no tensors of a video model in a known layout.
    """
    for name, layout in LAYOUTS.items():
        if layout.recognises(shapes):
            return name
    if any(key.startswith(_NATIVE_PARTS) for key in shapes):
        return NATIVE
    known = ", ".join((NATIVE, *LAYOUTS))
    got = f"tensors such as {next(iter(shapes))}" if shapes else "no tensors"
    raise ValueError(f"expected a video model in one of the layouts {known}; got {got}")


def plan(shapes: Shapes, *, source: str, target: str, partial: bool = False) -> Conversion:
    """Decide what becomes of every tensor of a checkpoint.

    Nothing is read or computed: this needs a file's header alone. Between two layouts of which none
    is the native one the way goes through the native one.

    Args:
        shapes: shapes of the checkpoint's tensors by name, in the source layout.
        source: the layout it has, see :func:`detect`.
        target: the layout it is to have.
        partial: the checkpoint may lack whole parts, such as all but the U-Net; what it has of a
            part must be complete.

    Raises:
        ValueError: an unknown layout; or some tensor is missing, left over or misshapen, with its
            name.
    """
    for name in (source, target):
        if name != NATIVE and name not in LAYOUTS:
            known = ", ".join((NATIVE, *LAYOUTS))
            raise ValueError(f"expected one of the layouts {known}; got {name!r}")
    if source == target:
        return _unchanged(shapes)
    if source == NATIVE:
        return LAYOUTS[target].from_native(shapes, partial)
    native = LAYOUTS[source].to_native(shapes, partial)
    if target == NATIVE:
        return native
    return native.then(LAYOUTS[target].from_native(native.shapes, partial))


def _unchanged(shapes: Shapes) -> Conversion:
    return Conversion(
        tuple(Entry(key, tuple(shape), (key,), lambda x: x) for key, shape in shapes.items())
    )
