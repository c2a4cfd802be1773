"""The real SageAttention as the user's own attention, without a card: ``python -O real_sage.py``.

Its kernels are Triton's, whose interpreter runs them (``TRITON_INTERPRET=1``); only an ``assert``
stands against tensors of a CPU, and ``-O`` leaves those out. Prints what was seen as JSON.
"""

import json
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "tiny")]

import tiny_comfy  # noqa: E402

from demo.comfy_server import comfyui_path  # noqa: E402

OVERRIDE = "optimized_attention_override"


def main():
    sys.path.insert(0, str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    from comfy.ldm.modules import attention

    from comfyui_liteattention.integrations.comfy.session import apply_patch, patch_of
    from comfyui_liteattention.run import TIMED
    from comfyui_liteattention.settings import Settings

    lengths = []

    def sage(func, *args, **kwargs):
        """As packs put it into a model; ComfyUI falls back without a word to who calls it."""
        q, k, *_ = args
        lengths.append([q.shape[1], k.shape[1]])
        return attention.attention_sage(*args, **kwargs)

    def sampled(model):
        lengths.clear()
        return tiny_comfy.sample(model, tiny_comfy.find("Wan T2V"), frames=2, cfg=1.0)

    plain = tiny_comfy.make_patcher(tiny_comfy.find("Wan T2V"))
    exact = sampled(plain)
    user = plain.clone()
    user.model_options["transformer_options"][OVERRIDE] = sage
    dense = sampled(user)
    seen = {"differs_from_exact": not torch.equal(dense, exact), "all_calls": list(lengths)}
    declined = apply_patch(user, Settings(min_tokens=100_000))
    seen["declined_is_equal"] = torch.equal(sampled(declined), dense)
    seen["declined_calls"] = list(lengths)
    settings = Settings(threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0)
    skipping = apply_patch(user, settings)
    out = sampled(skipping)
    seen["skipping_calls"] = list(lengths)
    seen["error"] = float((out - dense).norm() / dense.norm())
    report = patch_of(skipping).last_report
    seen["computed"], seen["waiting"] = report.computed_fraction, report.reasons[TIMED]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
