"""The widths at which the parts of a model meet, compared when it is built."""

from torch import nn

from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.modules.encoders.conditioner import GeneralConditioner


def check_widths(
    network: nn.Module, conditioner: GeneralConditioner, first_stage: nn.Module
) -> None:
    """Make sure that a U-Net takes what the embedders and the latents give it.

    Where the network is another one, or a part does not tell its width, nothing is compared.

    Args:
        network: the U-Net.
        conditioner: all embedders.
        first_stage: the autoencoder, of whose latents there are ``latent_channels``.

    Raises:
        ValueError: names the key of the YAML that does not fit, and what it has to add up to.
    """
    given, z = conditioner.widths(), getattr(first_stage, "latent_channels", None)
    if given is None or z is None or not isinstance(network, VideoUNet):
        return
    latents = {"latents": z}
    for key, parts in {
        "adm_in_channels": given["vector"],
        "context_dim": given["crossattn"],
        "in_channels": latents | given["concat"],
        "out_channels": latents,
    }.items():
        takes, gives = getattr(network, key), sum(parts.values()) or None
        if takes != gives:
            sources = " + ".join(f"{width} of {name}" for name, width in parts.items())
            raise ValueError(
                f"network_config.params.{key}: expected {gives} ({sources or 'nothing enters'}), "
                f"got {takes}: change it, or the parts in conditioner_config and first_stage_config"
            )
