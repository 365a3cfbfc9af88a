"""HLIP's preparation of chest CT and brain MRI, and its choice of scans."""

import numpy as np

from jaxmed.data import ops

SYSTEM = "hlip"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def prep_chest_ct(case):
    produced = {}
    (low, high), target = case.config["hu"], case.config["target"]
    for i in range(len(case.config["shapes"])):
        hu = np.clip(case.input[f"hu_{i}"], low, high)
        for name, out in (("crop", ops.pad_crop(hu, target, low)[0]), ("resize", ops.resize(hu, target)[0])):
            produced[f"output/{name}_{i}"] = ops.standardise(ops.unit_range(out, low, high))
    return produced


def prep_brain_eval(case):
    produced = {}
    for i in range(len(case.config["shapes"])):
        scan = case.input[f"scan_{i}"]
        scan = scan[..., 0] if scan.ndim == 4 else scan
        for n in case.config["num_slices"]:
            out, _ = ops.slice_grid(scan, resize_to=case.config["resize"], slices=n, crop=case.config["crop"])
            produced[f"output/scan_{i}_slices_{n}"] = ops.standardise(ops.unit_range(out, 0, 255))
    return produced


def prep_mri_raw(case):
    produced = {}
    for i in range(case.config["n"]):
        # The file's array is (x, y, z) with directions in LPS; ours is (d, h, w) = (z, y, x) with an affine to RAS.
        affine = np.eye(4)
        affine[:3, :3] = (LPS_TO_RAS @ case.input[f"direction_{i}"] * case.input[f"spacing_{i}"])[:, ::-1]
        voxels, _ = ops.reorient(case.input[f"voxels_{i}"].transpose(2, 1, 0), affine, "IPR", slice_first=True)
        unit = ops.percentile_unit(voxels)
        produced[f"output/uint8_{i}"] = ops.truncate_uint8(unit)
        produced[f"output/unit_{i}"] = unit
    return produced


def prep_ct_spacing(case):
    return {
        f"output/resampled_{i}": ops.resample(case.input[f"hu_{i}"], c["spacing"], case.config["target"])[0]
        for i, c in enumerate(case.config["cases"])
    }


def scan_sampling(case):
    return {
        f"output/{how}_len{count}_n{n}": ops.scan_indices(count, n, how)
        for count, n in case.config["cases"]
        for how in ("train", "eval_main", "eval_newer")
    }


READERS = {
    "prep_chest_ct": prep_chest_ct,
    "prep_brain_eval": prep_brain_eval,
    "prep_mri_raw": prep_mri_raw,
    "prep_ct_spacing": prep_ct_spacing,
    "scan_sampling": scan_sampling,
}
