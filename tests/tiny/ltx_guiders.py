"""The guiders of ComfyUI-LTXVideo, *STG Guider* and *Multimodal Guider*, as the model and we meet
them: which conditionings they ask in an evaluation, with which options, and how one is perturbed.

Written down from ``stg.py`` and ``guiders/multimodal_guider.py`` at aceeae9. How they weigh what
comes back is their affair; this adds up differences.
"""

from unittest.mock import patch as replaced

PLAIN = dict(run_vx=True, run_ax=True, a2v_cross_attn=True, v2a_cross_attn=True)
PERTURBED = dict(ptb_index=0)
#: ``(conditioning, options, whether blocks are perturbed)`` of each pass of an evaluation.
STG = [("positive", {}, False), ("negative", {}, False), ("positive", PERTURBED, True)]
MULTIMODAL = [
    ("positive", PLAIN, False),
    ("negative", PLAIN, False),
    ("positive", PLAIN | PERTURBED | dict(stg_indexes=[0, 2]), True),
    ("positive", PLAIN | dict(a2v_cross_attn=False, v2a_cross_attn=False), False),
]


class Block:
    """In place of a block: while its guider perturbs, some of the attentions in it give their
    values back. It swaps ComfyUI's function for that, and tells nobody."""

    def __init__(self, guider, index):
        self.guider = guider
        self.index = index

    def __call__(self, args, extra):
        from comfy.ldm.modules import attention

        if not self.guider.perturbing or self.index not in self.guider.perturbed:
            return extra["original_block"](args)
        given_back = args["transformer_options"].get("stg_indexes", [0])
        names = ("optimized_attention", "optimized_attention_masked")
        usual, asked = {name: getattr(attention, name) for name in names}, []

        def instead(name):
            def attend(q, k, v, *args, **kwargs):
                asked.append(name)
                return v if len(asked) - 1 in given_back else usual[name](q, k, v, *args, **kwargs)

            return attend

        with replaced.multiple(attention, **{name: instead(name) for name in names}):
            return extra["original_block"](args)


def make_guider(model, passes, perturbed, without_video=()):
    """``passes``: see above; ``perturbed``: indices of blocks; ``without_video``: evaluations that
    leave the video as the one before had it."""
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        perturbing = False
        evaluations = 0

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            alone = dict(run_vx=False, stg_indexes=[0])  # so that sound's own comes first
            here = alone if self.evaluations in without_video else {}
            self.evaluations += 1
            first, *others = (self._ask(x, timestep, model_options, here, one) for one in passes)
            return first + sum(0.2 * (first - other) for other in others)

        def _ask(self, x, timestep, model_options, here, one):
            name, options, self.perturbing = one
            shared = model_options["transformer_options"]
            shared.update(options | {name: here[name] for name in options if name in here})
            try:
                conds = [self.conds[name]]
                ask = comfy.samplers.calc_cond_batch
                return ask(self.inner_model, conds, x, timestep, model_options)[0]
            finally:
                self.perturbing = False
                for option in options:
                    del shared[option]

    model = model.clone()
    guider = Guider(model)
    guider.perturbed = set(perturbed)
    for i in range(len(model.model.diffusion_model.transformer_blocks)):
        model.set_model_patch_replace(Block(guider, i), "dit", "double_block", i)
    return guider
