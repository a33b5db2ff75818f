"""Which models of ours timm has too, with the same parameters and the same function."""

TIMM = {
    **{f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base")},
    **{f"davit_{size}": f"davit_{size}" for size in ("tiny", "small", "base")},
    **{f"maxvit_{size}": f"maxvit_{size}_tf_224" for size in ("tiny", "small", "base", "large")},
    **{f"pvt_v2_b{size}": f"pvt_v2_b{size}" for size in range(6)},
}
USUAL = ("swin_tiny", "convnext_tiny", "davit_tiny", "vit_small", "pvt_v2_b1")  # one of each family
