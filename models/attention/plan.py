"""One mechanism in the first blocks of every stage, another in the others: how papers place theirs in a backbone.

Agent-Swin-T is [all, all, all, 0] (AAAB in its authors' code), Agent-Swin-B [all, all, 2, 0] (AAMB2).
"""

from collections.abc import Sequence

from models.attention import AttentionFactory, Mixer, Refused, Site, make


def first_blocks(
    site: Site, *, blocks: Sequence[int | str], first: AttentionFactory, rest: AttentionFactory, backend: str = "auto"
) -> Mixer:
    """The mixer of a place: `first` in the first blocks of its stage, `rest` in the others.

    Args:
        site: the place in the backbone.
        blocks: of each stage, how many blocks get `first`, counted from its beginning; "all" for the whole stage. A
            plain ViT has one stage.
        first, rest: factories of mixers.
        backend: what both are configured with; see conf/attention/plan and conf/families.py.

    Raises:
        Refused: there is no entry for the stage, or it is no number of blocks.
    """
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise Refused(
            f"blocks={blocks!r} is no list", "give attention.blocks one entry per stage, e.g. [all, all, 2, 0]"
        )
    if site.kind == "vit" and len(blocks) != 1:
        raise Refused(f"blocks={list(blocks)} has {len(blocks)} entries and a ViT one stage", "give one, e.g. [4]")
    if site.stage >= len(blocks):
        raise Refused(
            f"blocks={list(blocks)} has no entry for stage {site.stage}", "give attention.blocks one entry per stage"
        )
    count = blocks[site.stage]
    if count != "all" and (not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= site.depth):
        raise Refused(
            f"blocks={list(blocks)} asks for {count!r} of {site.depth} blocks in stage {site.stage}",
            "use numbers of blocks up to the depth of the stage, or all",
        )
    return make(first if count == "all" or site.block < count else rest, site)


def in_turn(site: Site, *, even: AttentionFactory, odd: AttentionFactory, backend: str = "auto") -> Mixer:
    """The mixer of a place: `even` in the first, third, … block of its stage, `odd` in the others, as in L2ViT.

    Args:
        site: the place in the backbone.
        even, odd: factories of mixers, for blocks counted from 0.
        backend: what both are configured with.
    """
    return make(odd if site.block % 2 else even, site)
