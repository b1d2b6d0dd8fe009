"""pycolmap in a process of its own: `python -m handhold.tracking._sfm_worker WORKDIR`.

OpenCV 5 and pycolmap loaded together have aborted, so `sfm.py` never imports pycolmap; the two meet in `job.npz`,
`job.json` (in), `tracks.npz` (in, flow and learned, made while images are matched: a line on stdin says so) and
`models.npz` (out). Extraction and verification are shared out over the cores, pycolmap's own loops (matching, mapping)
have one thread, and seeds are fixed: the same job gives the same numbers. The settings are those measured to work:
doubled images, low contrast threshold, guided matching, neighbours in time only (look-alike faces matched across a clip
bend the model by 28 degrees and look like a success), intrinsics fixed.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pycolmap
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from handhold.parallel import each
from handhold.scene import load_npz, save_npz


def extract(job: dict, cfg: dict) -> tuple[list[np.ndarray], list]:
    """SIFT on each crop; per frame the key points in the mask (N,4+), upsampled pixels, and their descriptors."""
    o = pycolmap.FeatureExtractionOptions()
    o.num_threads, o.use_gpu = 1, False
    o.sift.peak_threshold = cfg["peak_threshold"]
    o.sift.max_num_features = cfg["max_features"]
    o.sift.first_octave = 0  # the crop is doubled already
    s, local = cfg["upsample"], threading.local()

    def look(f: int) -> tuple[np.ndarray, pycolmap.FeatureDescriptors | None]:
        if not hasattr(local, "extractor"):
            local.extractor = pycolmap.FeatureExtractor.create(o, pycolmap.Device.cpu)
        kp, de = np.zeros((0, 4), np.float32), None
        if f"image{f}" in job:
            found, data = local.extractor.extract_from_uint8_array(np.ascontiguousarray(job[f"image{f}"]))
            found = np.asarray(pycolmap.keypoints_to_matrix(found), np.float32)
            mask = job[f"mask{f}"]
            if len(found):
                ij = np.clip((found[:, :2] / s).astype(int), 0, np.array(mask.shape)[::-1] - 1)
                keep = mask[ij[:, 1], ij[:, 0]]
                kp, de = found[keep], pycolmap.FeatureDescriptors(data.type, np.ascontiguousarray(data.data[keep]))
                kp[:, :2] += s * job["corner"][f].astype(np.float32)
        return kp, de

    points, descriptors = zip(*each(look, range(len(job["corner"]))), strict=True)
    return list(points), list(descriptors)


def two_view_options(seed: int) -> pycolmap.TwoViewGeometryOptions:
    o = pycolmap.TwoViewGeometryOptions()
    o.ransac.random_seed, o.ransac.num_threads = seed, 1
    o.detect_watermark = False
    return o


def fill_database(db: pycolmap.Database, cfg: dict, points: list[np.ndarray], descriptors: list) -> None:
    """One camera; one image per frame with its key points and, where given, descriptors. Image ids are frame + 1."""
    w, h = cfg["size"]
    camera = pycolmap.Camera(model="PINHOLE", width=w, height=h, params=cfg["camera"])
    camera.camera_id = camera_id = db.write_camera(camera)
    rig = pycolmap.Rig(rig_id=1)
    rig.add_ref_sensor(camera.sensor_id)
    rig_id = db.write_rig(rig)
    for f, kp in enumerate(points):
        image = pycolmap.Image(name=f"{f:06d}.png", camera_id=camera_id, image_id=f + 1)
        db.write_image(image, use_image_id=True)
        frame = pycolmap.Frame(frame_id=f + 1, rig_id=rig_id)
        frame.add_data_id(image.data_id)
        db.write_frame(frame, use_frame_id=True)
        db.write_keypoints(f + 1, kp)
        if descriptors[f] is not None:
            db.write_descriptors(f + 1, descriptors[f])


def match_sift(path: Path, cfg: dict) -> None:
    """Guided matching of frames at most `overlap` apart.

    On one thread: with two, one run in a hundred found other matches.
    """
    m = pycolmap.FeatureMatchingOptions()
    m.num_threads, m.use_gpu, m.guided_matching = 1, False, True
    p = pycolmap.SequentialPairingOptions()
    p.overlap, p.quadratic_overlap, p.loop_detection, p.num_threads = cfg["overlap"], False, False, 1
    pycolmap.match_sequential(path, m, p, two_view_options(cfg["seed"]), pycolmap.Device.cpu)


def candidate_pairs(
    job: dict, cfg: dict, base: Path, sift_count: list[int], learned: dict[tuple[int, int], np.ndarray]
) -> dict[tuple[int, int], np.ndarray]:
    """Matches (M,2) of key point indices per frame pair: shared flow tracks, and learned or verified SIFT matches.

    A frame's key points are SIFT's, then flow's, then learned ones. A pair with learned matches does without SIFT's: it
    takes look-alike places for each other, and enough of them outvote the rest (over missing frames the object seems to
    halt), where LighterGlue looks at all key points of both frames at once.
    """
    rows = job["track"]  # (N,2) frame, track
    index = np.zeros(len(rows), np.int64)  # key point index of each flow observation in its frame
    of_frame = []
    for f, n in enumerate(sift_count):
        at = np.flatnonzero(rows[:, 0] == f)
        index[at] = n + np.arange(len(at))
        of_frame.append(at)
    out, last = {}, len(sift_count) - 1
    with pycolmap.Database.open(base) as db:
        for a in range(last + 1):
            for b in range(a + 1, min(a + cfg["overlap"], last) + 1):
                _, i, j = np.intersect1d(
                    rows[of_frame[a], 1], rows[of_frame[b], 1], assume_unique=True, return_indices=True
                )
                m = np.stack([index[of_frame[a][i]], index[of_frame[b][j]]], 1)
                if (a, b) in learned:
                    m = np.concatenate([m, learned[a, b]])
                elif db.exists_two_view_geometry(a + 1, b + 1):
                    sift = np.asarray(db.read_two_view_geometry(a + 1, b + 1).inlier_matches, np.int64).reshape(-1, 2)
                    m = np.concatenate([sift, m])
                if len(m) >= cfg["min_matches"]:
                    out[a, b] = m
    return out


def learned_matches(job: dict, before: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Matches (M,2) of the key point indices of learned features, `before` of other key points before them in a frame,
    per frame pair."""
    if not len(job.get("learned_match", ())):
        return {}
    frame, match = job["learned_frame"], job["learned_match"]
    first = np.searchsorted(frame, np.arange(len(before)))
    index = np.arange(len(frame)) - first[frame] + before[frame]
    pairs, which = np.unique(frame[match], axis=0, return_inverse=True)
    return {(int(a), int(b)): index[match[which.ravel() == k]] for k, (a, b) in enumerate(pairs)}


def verify(pairs: dict, points: list[np.ndarray], path: Path, cfg: dict) -> dict[tuple[int, int], np.ndarray]:
    """Keep what one two-view geometry explains, and write it to the mapper's database."""
    kept, o = {}, two_view_options(cfg["seed"])
    with pycolmap.Database.open(path) as db:
        fill_database(db, cfg, points, [None] * len(points))
        camera = db.read_camera(1)
        xy = [p.astype(np.float64) for p in points]

        def explain(pair: tuple[int, int]) -> pycolmap.TwoViewGeometry:
            a, b = pair
            return pycolmap.estimate_calibrated_two_view_geometry(
                camera, xy[a], camera, xy[b], pairs[pair].astype(np.uint32), o
            )

        for ((a, b), m), g in zip(pairs.items(), each(explain, pairs), strict=True):
            m = m.astype(np.uint32)
            if len(g.inlier_matches) >= cfg["min_matches"]:
                db.write_matches(a + 1, b + 1, m)
                db.write_two_view_geometry(a + 1, b + 1, g)
                kept[a, b] = np.asarray(g.inlier_matches, np.int64)
    return kept


def map_models(path: Path, out: Path, cfg: dict) -> list[pycolmap.Reconstruction]:
    """Incremental mapping with thresholds low enough for a small object; most frames first."""
    o = pycolmap.IncrementalPipelineOptions()
    o.num_threads, o.random_seed = 1, cfg["seed"]
    o.mapper.num_threads, o.mapper.random_seed, o.triangulation.random_seed = 1, cfg["seed"], cfg["seed"]
    o.ba_refine_focal_length = o.ba_refine_extra_params = o.ba_refine_principal_point = False
    o.mapper.abs_pose_refine_focal_length = o.mapper.abs_pose_refine_extra_params = False
    o.structure_less_registration_fallback = False  # it put a milk carton's first frame 87 degrees off
    o.min_model_size, o.min_num_matches, o.extract_colors = 3, cfg["min_matches"], False
    o.ba_global_frames_ratio = o.ba_global_points_ratio = 1.2
    o.ba_global_max_num_iterations, o.ba_local_max_num_iterations = 30, 15
    m = o.mapper
    m.init_min_num_inliers, m.init_min_tri_angle, m.init_max_reg_trials = 30, 6.0, 4
    m.abs_pose_min_num_inliers, m.abs_pose_min_inlier_ratio, m.abs_pose_max_error = 10, 0.15, 8.0
    m.max_reg_trials = 6
    out.mkdir(exist_ok=True)
    models = pycolmap.incremental_mapping(path, out, out, o)
    return sorted(models.values(), key=lambda r: (-r.num_reg_images(), -r.num_points3D()))


def join_tracks(kept: dict, points: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connected components of verified matches, one per frame: (N,2) frame, track; (N,2) xy; (N,) key point."""
    start = np.cumsum([0] + [len(p) for p in points])
    if not kept:
        return np.zeros((0, 2), np.int64), np.zeros((0, 2)), np.zeros(0, np.int64)
    edges = np.concatenate([m + [start[a], start[b]] for (a, b), m in kept.items()])
    graph = coo_matrix((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(start[-1],) * 2)
    label = connected_components(graph, directed=False)[1]
    frame = np.repeat(np.arange(len(points)), [len(p) for p in points])
    used = np.unique(edges)
    rows = np.stack([frame[used], label[used]], 1)
    _, first = np.unique(rows, axis=0, return_index=True)
    key = (used - start[frame[used]])[first]
    rows, xy = rows[first], np.concatenate([p[:, :2] for p in points])[used[first]]
    _, rows[:, 1], size = np.unique(rows[:, 1], return_inverse=True, return_counts=True)
    keep = size[rows[:, 1]] > 1
    rows, xy, key = rows[keep], xy[keep], key[keep]
    rows[:, 1] = np.unique(rows[:, 1], return_inverse=True)[1]
    return rows, xy.astype(np.float64), key


def lap(what: str, since: float) -> float:
    """Print the CPU seconds a step took (they end up in worker.log)."""
    now = time.process_time()
    print(f"{what}: {now - since:.1f} s")
    return now


def clean(workdir: Path) -> None:
    """Remove databases and models; a killed run's write-ahead log would otherwise be replayed into the next one's."""
    for path in workdir.glob("*.db*"):
        path.unlink()
    for path in workdir.glob("models_*"):
        shutil.rmtree(path, ignore_errors=True)


def main(workdir: Path) -> None:
    """For each region of the job: verified tracks and the mapper's models, written to models.npz."""
    cfg = json.loads((workdir / "job.json").read_text())
    job = load_npz(workdir / "job.npz")
    pycolmap.set_random_seed(cfg["seed"])
    pycolmap.logging.minloglevel = 2
    s, base = cfg["upsample"], workdir / "sift.db"
    clean(workdir)
    clock = time.process_time()
    points, descriptors = extract(job, cfg)
    clock = lap("extract", clock)
    with pycolmap.Database.open(base) as db:
        fill_database(db, cfg, points, descriptors)
    match_sift(base, cfg)
    clock = lap("match", clock)
    if not sys.stdin.readline():
        return  # whom this is for is gone
    job |= load_npz(workdir / "tracks.npz")
    sift_count = [len(p) for p in points]
    learned = learned_matches(job, sift_count + np.bincount(job["track"][:, 0], minlength=len(points)))
    pairs = candidate_pairs(job, cfg, base, sift_count, learned)
    others = [("track_xy", job["track"][:, 0])]
    if "learned_xy" in job:
        others.append(("learned_xy", job["learned_frame"]))
    points = [
        np.concatenate([p[:, :2], *(s * job[xy][frame == f] for xy, frame in others)]).astype(np.float32)
        for f, p in enumerate(points)
    ]
    on_object = []
    for p, (x0, y0), f in zip(points, job["corner"], range(len(points)), strict=True):
        m = job.get(f"object{f}", np.zeros((1, 1), bool))
        ij = np.clip((p / s).astype(int) - [x0, y0], 0, np.array(m.shape)[::-1] - 1)
        on_object.append(m[ij[:, 1], ij[:, 0]])
    out: dict[str, np.ndarray] = {}
    for region in cfg["regions"]:
        mine = pairs
        if region == "object":
            mine = {(a, b): m[on_object[a][m[:, 0]] & on_object[b][m[:, 1]]] for (a, b), m in pairs.items()}
            mine = {k: m for k, m in mine.items() if len(m) >= cfg["min_matches"]}
        path = workdir / f"{region}.db"
        kept = verify(mine, points, path, cfg)
        rows, xy, key = join_tracks(kept, points)
        clock = lap("verify", clock)
        models = map_models(path, workdir / f"models_{region}", cfg) if kept else []
        clock = lap("map", clock)
        poses = np.full((len(models), len(points), 4, 4), np.nan)
        for k, r in enumerate(models):
            for image in r.images.values():
                if image.has_pose:
                    poses[k, image.image_id - 1] = np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]])
        described = np.flatnonzero(key < np.array(sift_count)[rows[:, 0]])
        data = [descriptors[f].data[k] for f, k in zip(rows[described, 0], key[described], strict=True)]
        out |= {
            f"{region}_described": described,
            f"{region}_descriptor": np.array(data, np.uint8).reshape(-1, 128),
        }
        out |= {f"{region}_poses": poses, f"{region}_track": rows, f"{region}_xy": xy / s}
        if models and models[0].num_reg_images() >= 0.97 * len(points):
            break  # complete: another region costs time and gives nothing
    save_npz(workdir / "models.npz", out)
    clean(workdir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
