"""SAM 2 and SAM 3 as segmenters of a clip, through `transformers` (Apache-2.0; `pip install "handhold[sam]"`).

SAM 2 (Ravi et al., ICLR 2025): a mask of any object from a few clicks, carried through a video by a memory of what it
looked like. SAM 3's tracker has the same interface. Weights are the user's: a folder or a name on the Hugging Face hub;
only safetensors are read, and no code that comes with them is run. SAM 2's weights are Apache-2.0, SAM 3's have a
licence of their own. The prompts come from the clip itself (`sam_prompts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import MissingAsset, UnusableInput
from ..scene import Sequence
from .sam_prompts import BODIES, Predictor, Prompt, choose_prompts, fuse

CLASSES = {
    "sam2": ("Sam2VideoModel", "Sam2VideoProcessor"),
    "sam3": ("Sam3TrackerVideoModel", "Sam3TrackerVideoProcessor"),
}
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class SamPredictor:
    """A `Predictor` that asks SAM. model, processor: of `transformers`, on one device."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def __call__(
        self, frames: np.ndarray, prompts: list[Prompt], bodies: int, report: Callable[[float], None]
    ) -> np.ndarray:
        n = len(frames)
        out = np.empty((2, n, bodies, 0, 0), np.float16)
        for way, backwards in enumerate((False, True)):
            session = self._session(frames, prompts)
            start = n - 1 if backwards else 0
            order = self.model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=backwards)
            for done, answer in enumerate(_all_frames(order, self.model, session, n, backwards)):
                logits = answer.pred_masks[:, 0].float().clamp(-10, 10).cpu().numpy()  # -1024: not in view
                if out.shape[-2:] != logits.shape[-2:]:  # the first answer tells how fine they are
                    out = np.full((2, n, bodies, *logits.shape[-2:]), np.nan, np.float16)
                for body, x in zip(answer.object_ids, logits, strict=True):
                    out[way, answer.frame_idx, body] = x
                report((way + (done + 1) / n) / 2)
        out[:, :, sorted(set(range(bodies)) - {p.body for p in prompts})] = -10
        return out

    def _session(self, frames: np.ndarray, prompts: list[Prompt]):
        """A new session with all prompts answered in their frames, as the memory that propagation starts from."""
        device, dtype = self.model.device, self.model.dtype
        session = self.processor.init_video_session(
            video=frames, inference_device=device, video_storage_device="cpu", dtype=dtype
        )
        for frame in sorted({p.frame for p in prompts}):
            # all bodies of a frame at once: one that was tracked there before its prompt would forget it
            here = [p for p in prompts if p.frame == frame]
            self.processor.add_inputs_to_inference_session(
                session, frame, [p.body for p in here], input_boxes=[[p.box.tolist() for p in here]],
                input_points=[[p.points.tolist() for p in here]], input_labels=[[p.labels.tolist() for p in here]],
            )  # fmt: skip
            self.model(session, frame_idx=frame)
        return session


def _all_frames(order, model, session, n: int, backwards: bool):
    """What the iterator gives; it skips a clip of one frame when it goes backwards."""
    if n == 1 and backwards:
        yield model(session, frame_idx=0)
        return
    yield from order


def sam_choice(choice: str | Path) -> tuple[str, str] | None:
    """("sam2" or "sam3", folder or hub name) of a setting such as `sam2:facebook/sam2.1-hiera-small`, else None."""
    kind, _, where = str(choice).partition(":")
    return (kind, where) if kind in CLASSES else None


def open_sam(choice: str | Path, device: str | torch.device = "cpu") -> SamPredictor:
    """The predictor that a setting names.

    Raises MissingAsset when `transformers` is not installed or too old, UnusableInput when the folder or hub name does
    not hold such a model as safetensors.
    """
    kind, where = sam_choice(choice) or ("", "")
    if not kind:
        raise UnusableInput(f"{choice} does not name a SAM: write sam2: or sam3: and a folder or hub name.")
    folder = Path(where).expanduser()
    local = folder.is_dir()
    if not local and not _HUB.fullmatch(where):
        raise UnusableInput(f"{where!r} is neither a folder nor a name on the hub such as facebook/sam2.1-hiera-small.")
    if local and not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        raise UnusableInput(f"{folder} has no config.json and *.safetensors, so it is not a SAM for transformers.")
    model_class, processor_class = _classes(kind)
    source = str(folder) if local else where
    try:
        model = model_class.from_pretrained(source, use_safetensors=True, local_files_only=local)
        processor = processor_class.from_pretrained(source, local_files_only=local)
    except MissingAsset:
        raise
    except ImportError as e:
        raise MissingAsset(f'{kind} lacks a package ({_line(e)}); run `pip install "handhold[sam]"`.') from e
    except Exception as e:  # what a hub or a damaged file can raise is not a closed list
        raise UnusableInput(f"{where} cannot be read as {kind} ({_line(e)}).") from e
    return SamPredictor(model.to(device).eval(), processor)


def _classes(kind: str):
    try:
        import transformers
    except ImportError as e:
        raise MissingAsset(f'{kind} needs transformers; run `pip install "handhold[sam]"`.') from e
    try:
        return tuple(getattr(transformers, name) for name in CLASSES[kind])
    except (AttributeError, ImportError, RuntimeError) as e:
        raise MissingAsset(
            f"transformers {transformers.__version__} here has no {kind} ({_line(e)}); "
            'run `pip install --upgrade "handhold[sam]"`.'
        ) from e


def _line(e: BaseException) -> str:
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    return f"{type(e).__name__}: {lines[0][:160]}" if lines else type(e).__name__


def refine_masks(
    predictor: Predictor, sequence: Sequence, report: Callable[[float, str], None] | None = None
) -> Sequence:
    """The sequence with the masks of a promptable segmenter in place of its first ones.

    sequence: with masks and confidences from `tracking.masks.segment`. Bodies that no frame is sure of keep theirs, and
    so do those that the segmenter's answers contradict; notes say so.
    """
    say = report or (lambda share, what: None)
    names = [b for b in BODIES if b in sequence.masks]
    masks = [np.asarray(sequence.masks[b], bool) for b in names]
    confidence = [np.asarray(sequence.mask_confidence[b], np.float32) for b in names]
    prompts = choose_prompts(masks, confidence)
    if not prompts:
        note = "masks: no frame is sure enough to prompt SAM; the first masks stay"
        return replace(sequence, notes=(*sequence.notes, note))
    say(0.0, "SAM")
    logits = predictor(sequence.frames, prompts, len(names), lambda share: say(0.95 * share, "SAM"))
    prompted = {p.body for p in prompts}
    found, sure, agreement = fuse(logits, masks, confidence, [k in prompted for k in range(len(names))])
    notes = [
        f"masks: SAM's {name} hardly overlaps the sure first masks (IoU {a:.2f}), which stay"
        for k, (name, a) in enumerate(zip(names, agreement, strict=True))
        if k in prompted and np.array_equal(found[k], masks[k])
    ]
    say(1.0, "SAM")
    return replace(
        sequence,
        masks=dict(sequence.masks) | dict(zip(names, found, strict=True)),
        mask_confidence=dict(sequence.mask_confidence) | dict(zip(names, sure, strict=True)),
        notes=(*sequence.notes, *notes),
    )
