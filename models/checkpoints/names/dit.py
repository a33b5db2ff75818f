"""Names of weights in the files of facebookresearch/DiT, of the DiT of SkyworkAI/MoH, and of diffusers.

Source: DiT, arXiv:2212.09748, its code at commit ed81ce2; MoH, arXiv:2410.11842, its code at commit 2cefd57. Files of a
training run hold `model`, `ema`, `opt` and `args`; the released DiT-XL/2 is the averaged model alone. diffusers
(`DiTTransformer2DModel`) keeps the embedding of timestep and class once in every block, all the same; a model that was
trained there is another function, as its frequencies of the timestep end one step later.
"""

from models.checkpoints.names.layout import Joined, Layout

_RULES = (
    (r"^stem\.patch_embed\.", "x_embedder."),
    (r"^stem\.position\.sinusoid$", "pos_embed"),
    (r"^stem\.timestep\.", "t_embedder.mlp."),
    (r"^stem\.labels\.", "y_embedder.embedding_table."),
    (r"^final\.", "final_layer."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.attn\.(router|mixer)\.", ".attn."),
    (r"\.attn\.core\.", ".attn."),
)
_AUTHORS = Layout("facebookresearch/DiT and SkyworkAI/MoH", _RULES, numbered=True)
_EMBEDDING = "transformer_blocks.0.norm1.emb."
_DIFFUSERS = Layout(
    "diffusers",
    (
        (r"^stem\.patch_embed\.", "pos_embed."),
        (r"^stem\.position\.sinusoid$", "pos_embed.pos_embed"),
        (r"^stem\.timestep\.0\.", f"{_EMBEDDING}timestep_embedder.linear_1."),
        (r"^stem\.timestep\.2\.", f"{_EMBEDDING}timestep_embedder.linear_2."),
        (r"^stem\.labels\.", f"{_EMBEDDING}class_embedder.embedding_table."),
        (r"^final\.modulation\.", "proj_out_1."),
        (r"^final\.linear\.", "proj_out_2."),
        (r"^blocks\.", "transformer_blocks."),
        (r"\.modulation\.", ".norm1.linear."),
        (r"\.attn\.proj\.", ".attn1.to_out.0."),
        (r"\.attn\.", ".attn1."),
        (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
        (r"\.mlp\.fc2\.", ".ff.net.2."),
    ),
    joined=(Joined(r"\.qkv\.", ((".to_q.", 1), (".to_k.", 1), (".to_v.", 1))),),
    numbered=True,
    copies=(r"^transformer_blocks\.\d+\.norm1\.emb\.", _EMBEDDING),
)
LAYOUTS = (_AUTHORS, _DIFFUSERS)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return _AUTHORS
