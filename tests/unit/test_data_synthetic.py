"""Synthetic clips: the stated motion is the rendered one, and items depend on (seed, index)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sgm.data.motion import mean_flow, optical_flow
from sgm.data.scene import Draw, Layer, Move, Shape, draw_shape, mean_speed, picture_plane
from sgm.data.synthetic import Patch, PhotoCrops, Scene, SyntheticMotion
from sgm.util import instantiate_from_config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three smooth random photographs of several shapes, without black or white."""
    generator = torch.Generator().manual_seed(0)
    pictures = {}
    for name, size in {"wide": (160, 240), "tall": (200, 160), "square": (160, 160)}.items():
        noise = torch.rand((1, 3, size[0] // 8, size[1] // 8), generator=generator)
        smooth = F.interpolate(noise, size, mode="bicubic").clamp(0, 1)
        pictures[name] = (40 + 180 * smooth[0]).to(torch.uint8)
    path = tmp_path_factory.mktemp("photos") / "photos.safetensors"
    save_file(pictures, path)
    return path


def to_bytes(frames):
    return ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_items_have_the_agreed_form(photos):
    item = SyntheticMotion(photos, frames=5, size=(48, 64))[3]
    assert item["frames"].shape == (5, 3, 48, 64)
    assert item["frames"].dtype == torch.float32
    assert item["frames"].abs().max() <= 1
    for key in ("fps_id", "motion_bucket_id"):
        assert item[key].shape == ()
        assert item[key].dtype == torch.int64
    assert 6 <= item["fps_id"] <= 24
    assert PhotoCrops(photos, size=(48, 64))[3]["frames"].shape == (1, 3, 48, 64)


@pytest.mark.parametrize("kind", [SyntheticMotion, PhotoCrops])
def test_an_item_depends_on_the_seed_and_its_index_alone(photos, kind):
    # Catches a shared generator, and seeds folded to the same 32 bits.
    first, again, other = kind(photos, seed=1), kind(photos, seed=1), kind(photos, seed=2)
    torch.manual_seed(5)
    ahead = [first[i]["frames"] for i in (0, 1, 2)]
    torch.manual_seed(6)
    assert torch.equal(again[2]["frames"], ahead[2])
    assert torch.equal(again[0]["frames"], ahead[0])
    assert not torch.equal(ahead[0], ahead[1])
    assert not torch.equal(other[0]["frames"], ahead[0])
    assert not torch.equal(kind(photos, seed=2**32 + 1)[0]["frames"], ahead[0])


def test_dataset_is_built_from_a_config(photos):
    config = {
        "target": "sgm.data.synthetic.SyntheticMotion",
        "params": {"photos": str(photos), "frames": 3, "size": [64, 64], "length": 7},
    }
    assert len(instantiate_from_config(config)) == 7


def test_errors_name_the_problem(photos, tmp_path):
    with pytest.raises(ValueError, match="prepare_photos"):
        PhotoCrops(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="at least 2 frames"):
        SyntheticMotion(photos, frames=1)


def test_a_layer_starts_as_the_identity_and_its_flow_follows_a_point(photos):
    # An independent truth for the flow: solve for the point of the next frame that shows the same
    # place of frame 0. Catches a flow of the inverse map, a lost b, frames off by one.
    dataset = SyntheticMotion(photos, frames=6)
    points = picture_plane((64, 64))[0, ::16, ::16]
    for index in range(20):
        camera = dataset.draw_scene(Draw(0, index)).camera
        assert torch.allclose(camera(points)[0], points)
        arrived = points + camera.flow(points)
        for k in range(5):
            shown = camera.a[k + 1] * arrived[k] + camera.b[k + 1]
            assert torch.allclose(shown, camera(points)[k], atol=2e-4)


def test_mean_speed_of_known_moves():
    # A pan of 2 px, and a zoom by r whose mean flow is (1 / r - 1) times the mean radius.

    points = picture_plane((64, 64))[0]
    steps = torch.linspace(0, 1, 3)
    pan = Move(pan=0.6 + 0.8j, spin=0j, progress=steps)
    assert mean_speed(pan, 4, None, points) == pytest.approx(2, rel=1e-5)
    radius = 64 * (math.sqrt(2) + math.asinh(1)) / 6  # mean distance from the middle of a square
    zoom = Move(pan=0j, spin=complex(math.log(0.95)), progress=steps)
    assert mean_speed(zoom, 2, None, points) == pytest.approx((1 / 0.95 - 1) * radius, rel=1e-3)


def test_scenes_reach_the_drawn_speed_and_stay_inside_the_photograph(photos):
    dataset = SyntheticMotion(photos, seed=3)
    corners = torch.tensor([complex(x, y) for x in (-32, 32) for y in (-32, 32)])
    objects, ratios, speeds = 0, [], []
    for index in range(200):
        scene = dataset.draw_scene(Draw(3, index))
        wanted = Draw(3, index).uniform(5, 250) / 255 * 0.010 * 64
        ratios.append(scene.speed / wanted)
        at = torch.view_as_real(scene.window.centre + scene.window.scale * scene.camera(corners))
        height, width = scene.window.photo.shape[1:]
        assert at.min() >= -0.01
        assert at[..., 0].max() <= width + 0.01
        assert at[..., 1].max() <= height + 0.01
        objects += scene.thing is not None
        speeds.append(scene.speed)
    assert objects >= 100
    assert np.ptp(speeds) > 0.5  # of 0.64 pixels per frame, the fastest
    # An object that leaves the picture keeps a few from converging; they state what they show.
    assert np.mean(np.isclose(ratios, 1, rtol=0.01)) > 0.95


def test_approaching_cameras_move_into_the_scene(photos):
    """Catches a camera that backs away, or a share that is not the one asked for."""

    def approach(share):
        dataset = SyntheticMotion(photos, seed=5, approach_share=share)
        cameras = [dataset.draw_scene(Draw(5, index)).camera for index in range(100)]
        return np.mean([camera.a[-1].abs() < 0.995 for camera in cameras])

    assert approach(1.0) > 0.95  # the slowest ones move less than that
    assert approach(0.75) > approach(0.0) + 0.3


def test_stated_motion_is_what_an_optical_flow_estimate_sees(photos):
    # Catches a bucket of another move than the rendered one (wrong easing, sign, scale, order).
    dataset = SyntheticMotion(photos, frames=8, seed=4)
    items = [dataset[index] for index in range(24)]
    stated = np.array([int(item["motion_bucket_id"]) / 255 * 0.64 for item in items])
    seen = np.array([mean_flow(optical_flow(to_bytes(item["frames"]))) for item in items])
    assert np.corrcoef(stated, seen)[0, 1] > 0.97
    assert np.median(seen / stated) == pytest.approx(0.95, abs=0.1)


def test_frames_are_moved_copies_by_the_closed_form_flow(photos):
    # Brightness constancy: sampled along the true flow, the next frame repeats this one, for the
    # background and for the object alike. Catches a render whose geometry is not the flow's.
    dataset = SyntheticMotion(photos, frames=6, seed=5, object_share=0.5)
    points = picture_plane((64, 64))[0]
    errors, naive = [], []
    for index in range(16):
        scene = dataset.draw_scene(Draw(5, index))
        frames = scene.render((64, 64))
        arrived = points + scene.camera.flow(points)
        known = (arrived.real.abs() < 31) & (arrived.imag.abs() < 31)
        if scene.thing is not None:
            shape, _, motion = scene.thing
            covered = shape.mask(motion(points))
            arrived = torch.where(covered[:-1] > 0.5, points + motion.flow(points), arrived)
            near = F.max_pool2d((covered > 0.02).float(), 13, 1, 6) > 0
            inside = -F.max_pool2d(-(covered > 0.98).float(), 5, 1, 2) > 0
            known &= (~near[:-1] & ~near[1:]) | inside[:-1]
            known &= (arrived.real.abs() < 31) & (arrived.imag.abs() < 31)
        grid = torch.view_as_real(arrived) / 32
        moved = F.grid_sample(frames[1:], grid, align_corners=False)
        mask = known[:, None].expand_as(moved)
        errors.append((moved - frames[:-1])[mask].abs().mean().item())
        naive.append((frames[1:] - frames[:-1])[mask].abs().mean().item())
    assert max(errors) < 0.02
    assert np.mean(errors) < 0.2 * np.mean(naive)


def test_object_is_not_moved_by_the_camera_alone(photos):
    # The parallax and the drift: the object's flow differs from the background's around it.
    dataset = SyntheticMotion(photos, seed=6, object_share=1.0)
    ratios = []
    for index in range(40):
        scene = dataset.draw_scene(Draw(6, index))
        shape, _, motion = scene.thing
        spot = torch.tensor([shape.centre], dtype=torch.cfloat)
        difference = (motion.flow(spot) - scene.camera.flow(spot)).abs().mean()
        ratios.append(difference.item() / scene.speed)
    assert np.median(ratios) > 0.4
    assert min(ratios) > 0.02


def test_the_outline_of_an_object_moves_with_it():
    # A white disc of radius 9 over black, moved by (2, 1) a frame while the camera pans away.
    # Catches an outline that stays, or that goes with the camera.
    steps = torch.arange(6)
    camera = Layer(torch.ones(6), steps * (1.5 - 0.5j))
    motion = Layer(torch.ones(6), steps * -(2 + 1j))
    disc = Shape(-4 - 3j, radius=9, turn=1, stretch=1, corners=0, wobble=0)
    black, white = (Patch(torch.full((3, 9, 9), level), 1.0, 4.5 + 4.5j) for level in (0.0, 1.0))
    frames = Scene(camera, black, (disc, white, motion), speed=0, fps=8).render((64, 64))
    plane = picture_plane((64, 64))[0]
    mass = frames.mean(1)
    assert torch.allclose(mass.sum((1, 2)), torch.tensor(math.pi * 81), rtol=0.05)
    middles = (mass * plane).sum((1, 2)) / mass.sum((1, 2))
    assert torch.allclose(middles, -4 - 3j + steps * (2 + 1j), atol=0.05)


def test_shapes_cover_a_fraction_of_the_picture():
    covers = [
        draw_shape(Draw(0, i), (64, 64)).mask(picture_plane((64, 64))).mean() for i in range(50)
    ]
    assert min(covers) > 0.01
    assert max(covers) < 0.35


def test_averaging_avoids_aliasing(photos, tmp_path):
    # A checkerboard of single pixels, seen at more than two of them per output pixel, must turn
    # grey: point sampling would show moving stripes.
    y, x = torch.meshgrid(torch.arange(240), torch.arange(240), indexing="ij")
    board = (255 * ((x + y) % 2)).to(torch.uint8).expand(3, -1, -1).contiguous()
    save_file({"board": board}, tmp_path / "board.safetensors")
    dataset = PhotoCrops(tmp_path / "board.safetensors", size=(32, 32))
    contrasts = [dataset[i]["frames"].std().item() for i in range(8)]
    assert max(contrasts) < 0.2
