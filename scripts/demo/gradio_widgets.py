"""The widgets of the page in Gradio: the pictures, the model, and each of the options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gradio as gr

from sgm.inference.flags import Request
from sgm.inference.options import GROUPS, Option, SamplingOptions, option_fields
from sgm.inference.specs import SPECS, ModelSpec, default_spec
from sgm.serving.limits import Limits
from sgm.serving.models import default_offer
from sgm.serving.studio import Studio
from sgm.serving.widgets import bounds, has_slider, help_text, is_taken, label, placeholder

IN_SIGHT = ("motion_bucket_id", "num_frames", "num_steps", "seed")


def picture_input() -> gr.Gallery:
    """A place for pictures: to upload, to paste, or from the webcam."""
    pictures = gr.Gallery(
        label="Pictures (without one: the sample)",
        file_types=["image"],
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        interactive=True,
        columns=3,
        fit_columns=False,
        height=200,
    )
    take_uploads_alone(pictures)
    return pictures


def take_uploads_alone(component: Any) -> None:
    """Have a component refuse addresses, which Gradio would fetch for whoever sends one."""
    move = component.async_move_resource_to_block_cache

    async def take(place: str | Path | None) -> str | None:
        if "://" in str(place):
            raise gr.Error("upload the picture: addresses are not fetched", print_exception=False)
        moved: str | None = await move(place)
        return moved

    component.async_move_resource_to_block_cache = take


def model_input(studio: Studio) -> gr.Dropdown:
    """The choice of the model among those that are here, and how to get the others."""
    offers = studio.offers()
    first = default_offer(offers)
    chosen = first.spec if first else default_spec()  # which says what to do where there is none
    present = [offer.spec for offer in offers if offer.present]
    absent = [f"{offer.spec.name}: `{offer.command}`" for offer in offers if not offer.present]
    choices = [(f"{spec.name}: {spec.about}", spec.name) for spec in present]
    version = gr.Dropdown(choices, value=chosen.name, label="Model")
    if absent:
        with gr.Accordion("Other models, and how to get them", open=False):
            gr.Markdown("\n".join(f"- {line}" for line in absent))
    return version


def option_inputs(studio: Studio, version: gr.Dropdown) -> dict[str, Any]:
    """A widget for each option that visitors may set, by name; in sight where the model takes it.

    Args:
        studio: says what may be set, and what an empty widget stands for.
        version: the choice of the model, which they follow.
    """
    spec, usual = _model(studio, str(version.value))
    offered = {group: studio.limits.offered(group) for group in GROUPS}

    def widgets(options: list[Option], in_sight: bool) -> dict[str, Any]:
        chosen = [option for option in options if (option.name in IN_SIGHT) is in_sight]
        return {option.name: _widget(option, spec, usual, studio.limits) for option in chosen}

    inputs = widgets(offered["basic"], in_sight=True)
    panels = {}
    for group, options in offered.items():
        shown = _is_shown(options, spec)
        with gr.Accordion(GROUPS[group], open=False, visible=shown) as panels[group]:
            inputs |= widgets(options, in_sight=False)

    def follow(name: str) -> list[Any]:
        """The panels, then the widgets, as another model has them."""
        spec, usual = _model(studio, name)
        shown = [gr.update(visible=_is_shown(offered[group], spec)) for group in panels]
        options = {option.name: option for group in GROUPS for option in offered[group]}
        return [*shown, *(_update(options[name], inputs[name], spec, usual) for name in inputs)]

    places = [*panels.values(), *inputs.values()]
    version.change(follow, version, places, api_visibility="private", queue=False)
    return inputs


def _model(studio: Studio, name: str) -> tuple[ModelSpec, SamplingOptions]:
    """A model, and its own options."""
    return SPECS[name], studio.settings(name, None, SamplingOptions()).options


def _is_shown(panel: list[Option], spec: ModelSpec) -> bool:
    return any(is_taken(option, spec) for option in panel)


def _widget(option: Option, spec: ModelSpec, usual: SamplingOptions, limits: Limits) -> Any:
    """A widget for an option; where it is empty, the model decides."""
    meta, default = option.metadata, cast(Any, option.default)
    common: Any = {
        "label": label(option),
        "info": help_text(option),
        "visible": is_taken(option, spec),
    }
    match meta["kind"]:
        case "switch":
            return gr.Checkbox(default, **common)
        case "choice":
            unset = [(meta["unset"], "")] if default is None else []
            choices = [*unset, *((each, each) for each in meta["choices"])]
            return gr.Dropdown(choices, value=default or "", **common)
        case "integer" | "number" as kind if default is not None:
            style = {"step": meta["step"], "precision": 0 if kind == "integer" else None}
            if has_slider(option, limits):
                low, high = bounds(option, limits)
                return gr.Slider(low, high, default, **style, **common)
            return gr.Number(default, **style, **common)
    # As text also numbers that may be left out: gr.Number draws what is empty as 0.
    text = default or ""
    return gr.Textbox(text, placeholder=placeholder(option, usual), max_lines=1, **common)


def _update(option: Option, widget: Any, spec: ModelSpec, usual: SamplingOptions) -> Any:
    """What changes at a widget with the model."""
    shown: dict[str, Any] = {"visible": is_taken(option, spec)}
    if isinstance(widget, gr.Textbox):
        shown["placeholder"] = placeholder(option, usual)
    return gr.update(**shown)


def asked_options(held: Mapping[str, Any], spec: ModelSpec) -> SamplingOptions:
    """What the widgets hold, by the options' names, as options.

    Those that the model does not take are out of sight, and may hold what another one took: their
    defaults stand for them.

    Raises:
        ValueError: a refused value.
    """
    asked = SamplingOptions(**{name: _value(name, each) for name, each in held.items()})
    ignored = (option for option in option_fields() if not is_taken(option, spec))
    return asked.replace(**{option.name: option.default for option in ignored})


def _value(name: str, value: Any) -> Any:
    """What a widget holds, as the options take it."""
    if not isinstance(value, str):
        return value
    return Request.from_texts([], {name: value}).options.get(name) if value else None
