"""Which models of ours timm has too, with the same parameters and the same function."""

_SIZES = ("tiny", "small", "base")
_SAME = (
    *(f"{family}_{size}" for family in ("convnext", "davit") for size in _SIZES),
    *(f"pvt_v2_b{size}" for size in range(6)),
    *(f"focalnet_{size}_{reach}" for size in _SIZES for reach in ("srf", "lrf")),
    *(f"twins_{kind}_{size}" for kind in ("pcpvt", "svt") for size in ("small", "base", "large")),
    *(f"shvit_s{size}" for size in range(1, 5)),
    *(f"swiftformer_{size}" for size in ("xs", "s", "l1", "l3")),
)
_XCITS = ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")

TIMM = {
    **{name: name for name in _SAME},
    **{f"vit_{size}": f"vit_{size}_patch16_224" for size in _SIZES},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in _SIZES},
    **{f"maxvit_{size}": f"maxvit_{size}_tf_224" for size in (*_SIZES, "large")},
    **{f"xcit_{size}_{patch}": f"xcit_{size}_{patch}_224" for size in _XCITS for patch in ("p16", "p8")},
    **{"botnet_26t": "botnet26t_256", "halonet_26t": "halonet26t", "halonet_50ts": "halonet50ts"},
    **{"lambdaresnet_26t": "lambda_resnet26t", "lambdaresnet_50ts": "lambda_resnet50ts"},
}
# one of each family
USUAL = (
    *("swin_tiny", "convnext_tiny", "davit_tiny", "vit_small", "pvt_v2_b1", "maxvit_tiny", "focalnet_tiny_srf"),
    *("xcit_tiny_12_p16", "twins_svt_small", "botnet_26t", "halonet_26t", "lambdaresnet_26t", "shvit_s1"),
    "swiftformer_xs",
)
