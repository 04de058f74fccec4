"""Ways to damage the bytes of a file."""

from __future__ import annotations

from random import Random


def damaged(raw: bytes, rng: Random) -> tuple[str, bytes]:
    """A damage and what it leaves; never the same bytes."""
    names = ["flip", "flips", "cut", "cut front", "hole", "doubled", "half doubled", "emptied", "noise", "insert"]
    names += ["nul", "utf-16", "utf-32", "bom", "latin-1", "number", "list", "object", "null", "conflict", "upper"]
    while True:
        name = rng.choice(names)
        if (left := _damage(name, raw, rng)) != raw:
            return name, left


def _damage(name: str, raw: bytes, rng: Random) -> bytes:
    place = rng.randrange(max(1, len(raw)))
    if name in ("flip", "flips"):
        changed = bytearray(raw)
        for _ in range(1 if name == "flip" else rng.randint(2, 40)):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if name == "utf-16":
        return raw.decode("utf-8", "replace").encode("utf-16")
    if name == "utf-32":
        return raw.decode("utf-8", "replace").encode("utf-32")
    if name == "hole":
        return raw[:place] + raw[place + rng.randint(1, 64) :]
    if name == "noise":
        return rng.randbytes(rng.randint(1, 400))
    if name == "insert":
        return raw[:place] + rng.randbytes(rng.randint(1, 8)) + raw[place:]
    simple = {
        "cut": raw[:place],
        "cut front": raw[place:],
        "doubled": raw + raw,
        "half doubled": raw + raw[: len(raw) // 2],
        "emptied": b"",
        "nul": raw[:place] + b"\0" * 16 + raw[place + 16 :],
        "bom": b"\xef\xbb\xbf" + raw,
        "latin-1": raw[:place] + "é".encode("latin-1") + raw[place:],
        "number": b"3\n",
        "list": b"[1, [2, {}]]\n",
        "object": b"{}\n",
        "null": b"null\n",
        "conflict": raw[:place] + b"\n<<<<<<< HEAD\n=======\n" + raw[place:],
        "upper": raw.upper(),
    }
    return simple[name]
