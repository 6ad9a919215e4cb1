"""Makes parameters.ckpt beside this file, with the real MindSpore (2.10.0, on a CPU)::

    uv venv ms && uv pip install --python ms/bin/python mindspore==2.10.0
    ms/bin/python tests/data/mindspore/make.py

The cells are MindSpore's own, nested as in mindone's SVD example (``examples/svd``), which decides
their names: of every kind of layer that has parameters, at least one, at a place that the published
model has too. Widths are as small as a group norm of 32 groups takes. A value is its index in the
tensor, plus the tensor's number divided by 1024, so that tests know it without this library.
"""

from collections import OrderedDict
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

C = 32


def conv(inputs=C, outputs=C, kernel=1, bias=True):
    return nn.Conv2d(inputs, outputs, kernel, pad_mode="same", has_bias=bias)


def conv3d(outputs=C):
    return nn.Conv3d(outputs, outputs, (3, 1, 1), pad_mode="same", has_bias=True)


def norm():
    return nn.GroupNorm(32, C)


class ResBlock(nn.Cell):
    """The U-Net's, and its like over time."""

    def __init__(self, make_conv, embedding=True):
        super().__init__()
        self.in_layers = nn.SequentialCell([norm(), nn.SiLU(), make_conv()])
        self.emb_layers = nn.SequentialCell([nn.SiLU(), nn.Dense(4, C)]) if embedding else None
        self.out_layers = nn.SequentialCell([norm(), nn.SiLU(), nn.Dropout(p=0.0), make_conv()])


class Blender(nn.Cell):
    def __init__(self):
        super().__init__()
        self.mix_factor = Parameter([0.5])


class TemporalResBlock(ResBlock):
    def __init__(self, skip=False):
        super().__init__(conv)
        self.skip_connection = conv() if skip else nn.Identity()
        self.time_stack = ResBlock(conv3d)
        self.time_mixer = Blender()


class Attention(nn.Cell):
    def __init__(self, context):
        super().__init__()
        self.to_q = nn.Dense(8, 8, has_bias=False)
        self.to_k = nn.Dense(context, 8, has_bias=False)
        self.to_v = nn.Dense(context, 8, has_bias=False)
        self.to_out = nn.SequentialCell(nn.Dense(8, 8), nn.Dropout(p=0.0))


class Gate(nn.Cell):
    def __init__(self):
        super().__init__()
        self.proj = nn.Dense(8, 64)


class FeedForward(nn.Cell):
    def __init__(self):
        super().__init__()
        self.net = nn.SequentialCell([Gate(), nn.Dropout(p=0.0), nn.Dense(32, 8)])


class Transformer(nn.Cell):
    def __init__(self, temporal):
        super().__init__()
        if temporal:
            self.norm_in = nn.LayerNorm([8])
            self.ff_in = FeedForward()
        self.attn1, self.ff, self.attn2 = Attention(8), FeedForward(), Attention(6)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm([8]) for _ in range(3))


class TemporalTransformer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm = norm()
        self.proj_in = nn.Dense(C, 8)
        self.transformer_blocks = nn.CellList([Transformer(False)])
        self.proj_out = nn.Dense(8, C)
        self.time_stack = nn.CellList([Transformer(True)])
        self.time_pos_embed = nn.SequentialCell(nn.Dense(C, 8), nn.SiLU(), nn.Dense(8, C))
        self.time_mixer = Blender()


class Sampler(nn.Cell):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, conv())


class UNet(nn.Cell):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.SequentialCell(nn.Dense(C, 4), nn.SiLU(), nn.Dense(4, 4))
        self.label_emb = nn.SequentialCell(
            nn.SequentialCell(nn.Dense(6, 4), nn.SiLU(), nn.Dense(4, 4))
        )
        self.input_blocks = nn.CellList(
            [
                nn.SequentialCell(conv(8)),
                nn.SequentialCell(TemporalResBlock(), TemporalTransformer()),
                nn.SequentialCell(nn.Identity()),
                nn.SequentialCell(Sampler("op")),
                nn.SequentialCell(TemporalResBlock(skip=True)),
            ]
        )
        self.out = nn.SequentialCell(norm(), nn.SiLU(), conv(C, 4))


class ResnetBlock(nn.Cell):
    """The autoencoder's."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(), conv(), norm(), conv()


class VideoResBlock(ResnetBlock):
    def __init__(self):
        super().__init__()
        self.time_stack = ResBlock(conv3d, embedding=False)
        self.mix_factor = Parameter([0.25])


class AttnBlock(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm = norm()
        self.q, self.k, self.v, self.proj_out = (conv() for _ in range(4))


class ConvOut(nn.Conv2d):
    """A convolution with one over time within."""

    def __init__(self):
        super().__init__(C, 3, 3, pad_mode="same", has_bias=True)
        self.conv3d = conv3d(3)


class Coder(nn.Cell):
    def __init__(self, block, conv_out):
        super().__init__()
        self.conv_in = conv(4)
        self.mid = nn.Cell()  # as there: filled after it has been attached
        self.mid.block_1 = block
        self.mid.attn_1 = AttnBlock()
        self.norm_out = norm()
        self.conv_out = conv_out


class FirstStage(nn.Cell):
    def __init__(self):
        super().__init__()
        self.decoder = Coder(VideoResBlock(), ConvOut())


class Layer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm([8]), nn.LayerNorm([8])
        self.attn = nn.Cell()
        self.attn.in_proj_weight = Parameter(np.zeros((24, 8), np.float32), "in_proj_weight")
        self.attn.in_proj_bias = Parameter(np.zeros(24, np.float32), "in_proj_bias")
        self.attn.out_proj = nn.Dense(8, 8)
        self.mlp = nn.SequentialCell(
            OrderedDict(c_fc=nn.Dense(8, 16), gelu=nn.GELU(), c_proj=nn.Dense(16, 8))
        )


class Layers(nn.Cell):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.CellList([Layer()])


class Visual(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8, bias=False)
        self.class_embedding = Parameter(np.zeros(8, np.float32))
        self.positional_embedding = Parameter(np.zeros((5, 8), np.float32))
        self.ln_pre, self.ln_post = nn.LayerNorm([8]), nn.LayerNorm([8])
        self.transformer = Layers()
        self.proj = Parameter(Tensor(np.zeros((8, 6)), ms.float32))


class Clip(nn.Cell):
    """With what is left of its text side."""

    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(7, 6)
        self.positional_embedding = Parameter(Tensor(np.zeros((3, 6)), ms.float32))
        self.ln_final = nn.LayerNorm([6])
        self.text_projection = Parameter(Tensor(np.zeros((6, 6)), ms.float32))
        self.logit_scale = Parameter(Tensor(0.0, ms.float32))


class Holder(nn.Cell):
    """A cell that has others as attributes."""

    def __init__(self, **cells):
        super().__init__()
        for name, cell in cells.items():
            setattr(self, name, cell)


class Engine(nn.Cell):
    def __init__(self):
        super().__init__()
        self.model = Holder(diffusion_model=UNet())
        self.first_stage_model = FirstStage()
        clip = Holder(open_clip=Holder(model=Clip()))
        plain = [nn.Cell(), nn.Cell()]
        vae = Holder(encoder=Holder(encoder=Coder(ResnetBlock(), conv()), quant_conv=conv(8, 8)))
        self.conditioner = Holder(embedders=nn.CellList([clip, *plain, vae]))


def main():
    engine = Engine()
    for number, parameter in enumerate(engine.get_parameters()):
        size = int(np.prod(parameter.shape))
        values = np.arange(size).reshape(parameter.shape) + number / 1024
        dtype = (ms.float16, ms.bfloat16, ms.float32)[number % 3]
        parameter.set_dtype(dtype)
        parameter.set_data(Tensor(values, ms.float32).astype(dtype))
    path = Path(__file__).with_name("parameters.ckpt")
    ms.save_checkpoint(engine, str(path), append_dict={"epoch_num": 3, "note": "made for tests"})
    path.chmod(0o644)


if __name__ == "__main__":
    main()
