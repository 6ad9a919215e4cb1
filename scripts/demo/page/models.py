"""The model: those whose weights are here, and how to get the others."""

import streamlit as st

from scripts.demo.page.session import TROUBLE, keep, put
from sgm.errors import one_line
from sgm.inference.specs import ModelSpec, default_spec
from sgm.serving.models import Offer, default_offer
from sgm.serving.studio import Studio


def choose_model(studio: Studio) -> ModelSpec:
    """Let the visitor choose among the models that can run.

    Raises:
        ValueError: there is none; says what to do.
    """
    offers = studio.offers()
    first = default_offer(offers)
    if first is None:
        return default_spec()  # which says how to get one
    present = {offer.spec.name: offer for offer in offers if offer.present}
    if st.session_state.get("version") not in present:
        put("version", first.spec.name)
    chosen = present[st.selectbox("Model", list(present), key="version")]
    loaded = "; loaded" if studio.loaded == chosen.spec.name else ""
    st.caption(f"{chosen.spec.about}; {chosen.size}; {chosen.licence}{loaded}")
    absent = [offer for offer in offers if not offer.present]
    with st.expander("Models and memory", icon=":material/deployed_code:"):
        _memory(studio)
        for offer in absent:
            _absent(offer)
    return chosen.spec


def refuse_model(studio: Studio, name: str) -> str | None:
    """Why a link's model cannot be had here; None where it can."""
    offers = {offer.spec.name: offer for offer in studio.offers()}
    if name not in offers:
        return f"the model {name} is not offered here"
    if not offers[name].present:
        return f"the weights of {name} are not here: {offers[name].command}"
    return None


def _memory(studio: Studio) -> None:
    keep("unload_trouble", "")
    text = f"**{studio.loaded}** is in memory" if studio.loaded else "No model is in memory yet"
    st.markdown(f"{text}; it is shared by all visitors.")
    if studio.loaded:
        st.button("Unload", key="unload", on_click=_unload, args=(studio,))
    if st.session_state.unload_trouble:
        st.warning(st.session_state.unload_trouble)


def _unload(studio: Studio) -> None:
    st.session_state.unload_trouble = ""
    try:
        studio.unload()
    except TROUBLE as error:
        st.session_state.unload_trouble = one_line(error)


def _absent(offer: Offer) -> None:
    st.markdown(f"**{offer.spec.name}**: {offer.spec.about}  \n{offer.size}, {offer.licence}")
    st.code(offer.command, language="bash", wrap_lines=True)
