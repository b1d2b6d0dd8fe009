"""Crops of hands, the cameras that see them, and the way back.

**Convention.** A crop is the picture of a virtual camera with the true camera's centre that looks along the ray through
the middle of the hand's box, turned about its own axis by `angle`, and mirrored for a left hand. The true camera's
pixels map to it by a homography: an affine crop would show a hand away from the principal axis under a rotation that no
network can see. So what a hand looks like in its crop, and every three-dimensional truth in the crop camera's frame,
does not depend on where in the picture the hand is; rotations, joints and vertices come back by `crop_from_camera`,
which is orthogonal with determinant -1 where the crop is mirrored. Networks see right hands only. `affine=True` gives
the crops that HaMeR, WiLoR and METRO were trained on instead (the crop camera then has the true camera's axes).

A hand in the crop frame is the *right* model with root rotation C R M and finger rotations M R M, where C is
`crop_from_camera` and M = diag(-1,1,1) for left hands, the identity for right ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from ..datasets.synthetic.sample import HandTruth, SynthBatch, map_tensors
from ..hand.model import HandModel
from .crop_sampling import apply, inverse, planes, sample_crops

IMAGE_SIZE = (224, 224)
MARGIN = 1.6  # side of a crop over that of the box around the 21 joints


@dataclass(frozen=True)
class CropJitter:
    """Random changes of training crops, as careless detections would make them."""

    scale: float = 0.25  # the box grows or shrinks by up to exp(+-scale)
    shift: float = 0.12  # of the box, standard deviation, each axis
    angle: float = 25.0  # degrees about the crop's axis, standard deviation
    upright: float = (
        0.0  # share of the crops turned so that the middle finger's root is above the wrist (then jittered)
    )
    any_angle: float = 0.0  # share of the crops turned by any angle at all


@dataclass(frozen=True, eq=False)
class CropTruth:
    """Truth of each crop, in its crop camera's frame, for the right hand (see the module's convention). Metres."""

    rotations: Tensor  # (N,16,3,3)
    betas: Tensor  # (N,10)
    transl: Tensor  # (N,3) of the right model
    joints: Tensor  # (N,21,3)
    vertices: Tensor  # (N,V,3)
    points: Tensor  # (N,21,2) crop pixels
    visible: Tensor  # (N,21) bool
    hidden: Tensor  # (N,) share of the hand that other bodies hide
    inside: Tensor  # (N,) share of the hand inside the picture
    weight: Tensor  # (N,) 1; 0 for rows that only fill a batch of fixed size


@dataclass(frozen=True, eq=False)
class HandCrops:
    """N crops with their cameras. `truth` is there in training only."""

    image: Tensor  # (N,3,h,w) sRGB in [0,1], zero outside the picture
    K: Tensor  # (N,3,3) intrinsics of the crop cameras, crop pixels
    crop_from_camera: Tensor  # (N,3,3) orthogonal; determinant -1 where flipped
    crop_from_image: Tensor  # (N,3,3) homography, true pixels to crop pixels; affine when the crops are
    image_K: Tensor  # (N,3,3) intrinsics of the true cameras
    flipped: Tensor  # (N,) bool: left hands
    picture: Tensor  # (N,) int64 row of the batch of pictures
    truth: CropTruth | None = None

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: str | torch.device) -> HandCrops:
        return map_tensors(self, lambda x: x.to(device, non_blocking=True))

    def rows(self, index: Tensor | slice) -> HandCrops:
        """Some of the crops."""
        return map_tensors(self, lambda x: x[index])

    def with_truth(self, truth: HandTruth, weight: Tensor | None = None) -> HandCrops:
        """The same crops with the truth of their hands, which is given in the true camera's frame, row by row."""
        c, m = self.crop_from_camera, mirrors(self.flipped)
        rotations = m[:, None] @ truth.rotations.float() @ m[:, None]
        rotations[:, 0] = c @ truth.rotations[:, 0].float() @ m
        joints = truth.joints.float() @ c.mT
        # the wrist is fixed under the root's rotation: transl = wrist - rest wrist, which mirrors too
        rest = truth.joints[:, 0].float() - truth.transl.float()
        transl = joints[:, 0] - (m @ rest[..., None])[..., 0]
        points = apply(self.crop_from_image, truth.points.float())
        made = CropTruth(
            rotations, truth.betas.float(), transl, joints, truth.vertices.float() @ c.mT, points, truth.visible,
            truth.hidden, truth.inside, torch.ones_like(transl[:, 0]) if weight is None else weight,
        )  # fmt: skip
        return replace(self, truth=made)


@dataclass(frozen=True, eq=False)
class HandPrediction:
    """What a network says of N hands, in the true camera's frame and pixels and in the convention of each side's own
    model. `rotations`, `betas` and `transl` are None where a network gives the surface only."""

    flipped: Tensor  # (N,) bool: left hands
    picture: Tensor  # (N,) int64 row of the batch of pictures
    rotations: Tensor | None  # (N,16,3,3)
    betas: Tensor | None  # (N,10)
    transl: Tensor | None  # (N,3)
    joints: Tensor  # (N,21,3) metres
    vertices: Tensor  # (N,V,3) metres
    points: Tensor  # (N,21,2) pixels: seen by the network, not the joints' projection
    sigma: Tensor  # (N,21) pixels, expected error of each point
    confidence: Tensor  # (N,21) in [0,1]: 1 for an error of nothing, 1/2 for one of 4 % of the crop

    def __len__(self) -> int:
        return len(self.joints)

    def to(self, device: str | torch.device) -> HandPrediction:
        return map_tensors(self, lambda x: x.to(device))

    def rows(self, index: Tensor | slice) -> HandPrediction:
        """Some of the hands."""
        return map_tensors(self, lambda x: x[index])


def mirrors(flipped: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N,) bool -> (N,3,3): diag(-1,1,1) where true, the identity elsewhere."""
    sign = 1 - 2 * flipped.to(dtype)
    return torch.diag_embed(torch.stack([sign, torch.ones_like(sign), torch.ones_like(sign)], -1))


def look_at(rays: Tensor) -> Tensor:
    """The smallest rotations (N,3,3) that take rays (N,3) with z > 0 to the z axis."""
    x, y, z = (rays / rays.norm(dim=-1, keepdim=True)).unbind(-1)
    k = 1 / (1 + z)
    rows = [1 - k * x * x, -k * x * y, -x, -k * x * y, 1 - k * y * y, -y, x, y, z]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def turns(angle: Tensor) -> Tensor:
    """Angles (N,) radians -> rotations (N,3,3) about z."""
    c, s, o = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([c, -s, o, s, c, o, o, o, o + 1], -1).unflatten(-1, (3, 3))


def box_of_points(points: Tensor, valid: Tensor | None = None) -> Tensor:
    """Boxes (N,4) x0 y0 x1 y1 around points (N,P,2), or those that are valid (N,P) bool (at least one must be)."""
    if valid is None:
        return torch.cat([points.amin(1), points.amax(1)], -1)
    hole = ~valid[..., None]
    return torch.cat([points.masked_fill(hole, math.inf).amin(1), points.masked_fill(hole, -math.inf).amax(1)], -1)


def crop_cameras(
    K: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    angles: Tensor | None = None,
    size: tuple[int, int] = IMAGE_SIZE,
    margin: float = MARGIN,
    affine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cameras of the crops of boxes.

    K (N,3,3) true intrinsics; boxes (N,4) pixels, x0 y0 x1 y1, tight around the 21 joints; flipped (N,) bool left
    hands; angles (N,) radians by which the crop's content is turned clockwise before it is mirrored; size (height,
    width) of the crops. The box is scaled by `margin` and fits into the crop with its proportions kept.
    Returns crop intrinsics (N,3,3), crop_from_camera (N,3,3) and crop_from_image (N,3,3); see `HandCrops`.
    """
    h, w = size
    angles = boxes.new_zeros(len(boxes)) if angles is None else angles
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(2.0)
    focal = K[:, [0, 1], [0, 1]]
    mirror = mirrors(flipped, boxes.dtype)
    turn = turns(angles)
    # the turned box's extent: a box of unknown content may fill its ellipse, so the extents are turned as an ellipse's
    extent = ((turn[:, :2, :2] * extent[:, None]) ** 2).sum(-1).sqrt()
    middle = boxes.new_tensor([w / 2, h / 2])
    if affine:
        scale = torch.minimum(w / extent[:, 0], h / extent[:, 1]) / margin
        linear = mirror[:, :2, :2] @ turn[:, :2, :2] * scale[:, None, None]
        shift = middle - (linear @ centre[..., None])[..., 0]
        image = torch.zeros_like(K)
        image[:, :2, :2], image[:, :2, 2], image[:, 2, 2] = linear, shift, 1
        crop = torch.zeros_like(K)
        crop[:, 0, 0] = crop[:, 1, 1] = focal.mean(-1) * scale
        crop[:, :2, 2], crop[:, 2, 2] = middle, 1
        return crop, mirror @ turn, image
    ray = torch.cat([(centre - K[:, :2, 2]) / focal, torch.ones_like(centre[:, :1])], -1)
    turned = mirror @ turn @ look_at(ray)
    # local magnification of the homography at the centre: |ray| across the radius, |ray|^2 along it; its square root
    # of the determinant keeps the box's area
    length = ray.norm(dim=-1)
    density = extent / focal / length[:, None] ** 1.5
    f = torch.minimum(w / density[:, 0], h / density[:, 1]) / margin
    crop = torch.zeros_like(K)
    crop[:, 0, 0] = crop[:, 1, 1] = f
    crop[:, :2, 2], crop[:, 2, 2] = middle, 1
    return crop, turned, crop @ turned @ inverse(K)


def crop_hands(
    image: Tensor | np.ndarray,
    K: Tensor | np.ndarray,
    boxes: Tensor | np.ndarray,
    flipped: Tensor | np.ndarray | list[bool],
    angles: Tensor | None = None,
    picture: Tensor | None = None,
    size: tuple[int, int] = IMAGE_SIZE,
    margin: float = MARGIN,
    affine: bool = False,
    device: str | torch.device | None = None,
) -> HandCrops:
    """Crops of given boxes, for inference.

    image: one (H,W,3) picture, or a batch (B,3,H,W), uint8 or floats in [0,1]; K (3,3) or (B,3,3); boxes (N,4) pixels,
    tight around the 21 joints; flipped (N,) true for left hands; picture (N,) rows of the batch (default: all 0). The
    others as in `crop_cameras`.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.ascontiguousarray(image))
    image = image.to(device) if device is not None else image
    device = image.device
    K = torch.as_tensor(np.asarray(K) if not isinstance(K, Tensor) else K, dtype=torch.float32, device=device)
    boxes = torch.as_tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4)
    flipped = torch.as_tensor(flipped, dtype=torch.bool, device=device).reshape(-1)
    picture = torch.zeros(len(boxes), dtype=torch.int64, device=device) if picture is None else picture.to(device)
    image_K = K.expand(len(boxes), 3, 3) if K.ndim == 2 else K[picture]
    angles = None if angles is None else torch.as_tensor(angles, dtype=torch.float32, device=device)
    crop, turned, homography = crop_cameras(image_K, boxes, flipped, angles, size, margin, affine)
    pictures, read_from = planes(image, homography, size) if image.ndim == 3 else (image, homography)
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 255
    pixels = sample_crops(pictures, picture, read_from, size)
    return HandCrops(pixels, crop, turned, homography, image_K, flipped, picture)


def hand_crops(
    batch: SynthBatch,
    generator: torch.Generator | None,
    jitter: CropJitter | None = CropJitter(),  # noqa: B008
    size: tuple[int, int] = IMAGE_SIZE,
    margin: float = MARGIN,
    affine: bool = False,
    count: int | None = None,
    min_inside: float = 0.35,
    max_hidden: float = 0.97,
    angles: Tensor | None = None,
) -> HandCrops:
    """Training crops, with truth, of the hands of both sides that are present and can be seen.

    generator: on the batch's device; the same state gives the same crops. jitter: None for exact boxes, as in
    evaluation. count: exactly so many crops, drawn without repetition while there are enough (no synchronisation with
    the device then); `truth.weight` is 0 where there was nothing to draw. Otherwise all usable hands, in order.
    angles: (N,) radians of the crops where there is no jitter, as from `upright_angles`.
    min_inside, max_hidden: a hand is usable when at least this share of its vertices is in the picture and at most this
    share of its mask is hidden.
    """
    device = batch.image.device
    n = len(batch)
    hands = [batch.right, batch.left]
    both = HandTruth(**{k.name: torch.cat([getattr(t, k.name) for t in hands]) for k in fields(HandTruth)})
    left = torch.arange(2 * n, device=device) >= n
    usable = both.present & (both.inside >= min_inside) & (both.hidden <= max_hidden)
    usable = usable & (both.joints[..., 2].amin(-1) > 0.05) & torch.isfinite(both.points).all((1, 2))
    if count is None:
        index = usable.nonzero()[:, 0]
        weight = torch.ones(len(index), device=device)
    else:
        order = (torch.rand(2 * n, generator=generator, device=device) + (~usable).float() * 2).argsort()
        some = usable.sum()
        index = order[torch.arange(count, device=device) % some.clamp_min(1)]
        weight = (some > 0).float().expand(count).clone()
    truth = HandTruth(**{k.name: getattr(both, k.name)[index] for k in fields(HandTruth)})
    left, picture = left[index], index % n
    image_K = batch.K[picture].float()
    points = torch.nan_to_num(truth.points.float())
    boxes = box_of_points(points)
    angles = points.new_zeros(len(index)) if angles is None else angles
    if jitter is not None:
        boxes, angles = _jittered(boxes, points, left, jitter, generator)
    crop, turned, homography = crop_cameras(image_K, boxes, left, angles, size, margin, affine)
    pixels = sample_crops(batch.image, picture, homography, size)
    return HandCrops(pixels, crop, turned, homography, image_K, left, picture).with_truth(truth, weight)


def _jittered(boxes, points, left, jitter: CropJitter, generator):
    device, n = boxes.device, len(boxes)
    normal = torch.randn(n, 3, generator=generator, device=device)
    uniform = torch.rand(n, 4, generator=generator, device=device)
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(2.0)
    side = extent.amax(-1, keepdim=True)
    centre = centre + normal[:, :2].clamp(-2.5, 2.5) * jitter.shift * side
    extent = extent * torch.exp((2 * uniform[:, :1] - 1) * jitter.scale)
    angle = torch.deg2rad(normal[:, 2].clamp(-3, 3) * jitter.angle)
    angle = angle + torch.where(uniform[:, 1] < jitter.upright, upright_angles(points), 0.0)
    angle = torch.where(uniform[:, 2] < jitter.any_angle, (2 * uniform[:, 3] - 1) * math.pi, angle)
    return torch.cat([centre - extent / 2, centre + extent / 2], -1), angle


def upright_angles(points: Tensor) -> Tensor:
    """Angles (N,) radians, for `crop_cameras`, that put the middle finger's root above the wrist in the crop; points
    (N,21,2) pixels."""
    d = points[:, 9] - points[:, 0]
    return -math.pi / 2 - torch.atan2(d[:, 1], d[:, 0])


def project(points: Tensor, K: Tensor) -> Tensor:
    """Camera points (N,P,3) -> pixels (N,P,2) by K (N,3,3); depths below 1 cm count as 1 cm."""
    return (
        points[..., :2] / points[..., 2:].clamp_min(0.01) * K.diagonal(dim1=1, dim2=2)[:, None, :2] + K[:, None, :2, 2]
    )


def extent(like: Tensor, size: tuple[int, int]) -> Tensor:
    """(2,) width and height of a picture of `size` (height, width), made without a copy from the host."""
    return torch.cat([like.new_full((1,), size[1]), like.new_full((1,), size[0])])


def camera_translation(
    joints: Tensor,
    points: Tensor,
    K: Tensor,
    weights: Tensor | None = None,
    trust: float = 0.0,
    depth: Tensor | None = None,
) -> Tensor:
    """Where a hand is, from its shape and where its joints are seen: weighted linear least squares with the true K.

    Minimises sum_i w_i |x_i (Z_i + t_z) - (X_i + t_x)|^2 over both image axes, x_i being the points on the plane z = 1
    (the direct linear form; Hartley and Zisserman, 2004, ch. 7). t_x and t_y are eliminated by weighted means, which
    leaves one well-conditioned equation for t_z. Exact for exact points at any focal length.

    joints (N,P,3) metres up to a translation, camera axes; points (N,P,2) pixels; K (N,3,3); weights (N,P), default 1.
    depth (N,): a second opinion on t_z, to which the share `trust` of the answer is given. Returns (N,3).
    """
    x = (points - K[:, None, :2, 2]) / K[:, None, [0, 1], [0, 1]]
    w = torch.ones_like(x[..., 0]) if weights is None else weights
    w = (w / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny))[..., None]
    rest = x * joints[..., 2:] - joints[..., :2]  # = t_xy - x t_z
    mean_x, mean_rest = (w * x).sum(-2), (w * rest).sum(-2)
    dx, dr = x - mean_x[:, None], rest - mean_rest[:, None]
    z = -(w * dx * dr).sum((-1, -2)) / (w * dx * dx).sum((-1, -2)).clamp_min(1e-12)
    if depth is not None:
        z = torch.lerp(z, depth, trust)
    return torch.cat([mean_rest + mean_x * z[:, None], z[:, None]], -1)


def to_camera(
    crops: HandCrops,
    joints: Tensor,
    vertices: Tensor,
    points: Tensor,
    sigma: Tensor,
    rotations: Tensor | None = None,
    betas: Tensor | None = None,
    hand: HandModel | None = None,
    trust: float = 0.5,
) -> HandPrediction:
    """Network results in the crop frame -> the true camera's frame, pixels and each side's own convention.

    joints (N,21,3) and vertices (N,V,3) metres, placed in the crop camera's frame as well as the network can; points
    (N,21,2) and sigma (N,21) crop pixels, what it saw. The hand is placed by `camera_translation` in the true camera
    with weights 1/sigma^2; `trust` is the weight of the network's own depth against that of the fit (0: only the fit,
    as is right for affine crops, whose crop camera is not true). rotations (N,16,3,3), betas (N,10) of `hand`, the
    right model, give the parameters.
    """
    c, m = crops.crop_from_camera, mirrors(crops.flipped)
    back = inverse(crops.crop_from_image)
    seen = apply(back, points)
    # sigma: crop pixels per image pixel at each point
    nearby = apply(back, points + points.new_tensor([1.0, 0.0]))
    sigma_image = sigma * (nearby - seen).norm(dim=-1)
    weights = 1 / sigma.square().clamp_min(1e-6)
    j, v = joints @ c, vertices @ c  # row vectors: x c = c^T x
    wrist = j[:, :1].clone()
    local = j - wrist
    t = camera_translation(local, seen, crops.image_K, weights, trust, wrist[:, 0, 2])
    # a hand is at least 5 cm in front of the camera, whatever a bad fit says
    t = torch.where((t[:, 2:] < 0.05) & (wrist[..., 2] > 0.05), wrist[:, 0], t)
    size = crops.image.shape[-1]
    confidence = 1 / (1 + (sigma / (0.04 * size)) ** 2)
    own = transl = None
    if rotations is not None:
        own = m[:, None] @ rotations @ m[:, None]
        own[:, 0] = c.mT @ rotations[:, 0] @ m
    if rotations is not None and betas is not None and hand is not None:
        rest = hand.with_shape(betas).rest_joints[:, 0]
        transl = t - (m @ rest[..., None])[..., 0]
    return HandPrediction(
        crops.flipped, crops.picture, own, betas, transl, local + t[:, None], v - wrist + t[:, None], seen,
        sigma_image, confidence,
    )  # fmt: skip


def recrop(
    prediction: HandPrediction,
    image: Tensor | np.ndarray,
    K: Tensor | np.ndarray,
    upright: bool = False,
    **options,
) -> HandCrops:
    """Second look: crops around where a first pass saw the joints; `options` as in `crop_hands`."""
    angles = upright_angles(prediction.points) if upright else None
    boxes = box_of_points(prediction.points)
    return crop_hands(image, K, boxes, prediction.flipped, angles, prediction.picture, **options)
