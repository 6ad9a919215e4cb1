"""Videos made for tests, whose content, motion, cuts and fades are known.

shot = pan(scene(1), speed=0.01, frames=30)       # uint8 (t, h, w, 3)
write_video(tmp_path / "a.mp4", np.concatenate([shot, pan(scene(2), 0.02, 30)]), fps=15)
"""

import av
import cv2
import numpy as np

CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
    ".gif": "gif",
}


def write_video(path, frames, fps):
    """Encode uint8 (t, h, w, 3) frames, with few key frames, so that seeking matters."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        stream.gop_size = 12
        if path.suffix != ".gif":
            stream.bit_rate = 4_000_000
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())


def scene(seed, size=(160, 320)):
    """A picture of smooth coloured blobs, float32 (h, w, 3); every seed has its own colours."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(*size, 3))
    blobs = sum(cv2.GaussianBlur(noise, (0, 0), s) * s for s in (2.5, 8.0, 20.0))
    colours = generator.uniform(60, 195, 3)
    return np.clip(colours + 45 * blobs / blobs.std(), 0, 255).astype(np.float32)


def pan(picture, speed, frames, size=(72, 96)):
    """A camera that moves to the right by ``speed`` of the short side per frame: (t, h, w, 3)."""
    step = speed * min(size)
    top = (picture.shape[0] - size[0]) / 2
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return (
        np.stack(
            [
                cv2.warpAffine(
                    picture,
                    np.float32([[1, 0, 8 + step * i], [0, 1, top]]),
                    size[::-1],
                    flags=flags,
                    borderMode=cv2.BORDER_REFLECT,
                )
                for i in range(frames)
            ]
        )
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )


def blend(before, after, frames):
    """A dissolve between two shots of at least ``frames`` frames, joined there: (t, h, w, 3)."""
    weight = ((np.arange(frames) + 1) / (frames + 1))[:, None, None, None]
    mixed = before[-frames:] * (1 - weight) + after[:frames] * weight
    parts = [before[:-frames], mixed.round().astype(np.uint8), after[frames:]]
    return np.concatenate(parts)
