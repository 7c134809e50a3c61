"""Updates that take fewer bytes: how clients write them and how the server reads them.

D entries of all parameters together, T tensors; w⁰ is the model of the round, w what a client ended with and
g = w − w⁰ its update. What is written is what is sent: the bytes of a message are those of its arrays.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from lossworks.cohort import Member
from lossworks_federated.records import MODEL, array_record, member_from
from lossworks_federated.spec_parts import UpdatesSpec

KEPT = "updates"
"""Name under which clients keep the part of their updates that they have not sent."""
_STREAM = 78
_WHOLE = 32  # bits at which entries are sent as they are


class UpdateCoding:
    """Writes and reads updates as a spec says.

    ``top-k`` sends the k = ⌈share·D⌉ entries of the largest |g|, with their places (Aji, Heafield 2017);
    ``random-mask`` k entries that a seed draws, with the seed (Konečný et al. 2016, *Federated Learning:
    Strategies for Improving Communication Efficiency*); both send entries of w, so that those arrive as they
    are. ``quantised`` sends each entry of g as one of 2^bits levels, evenly spaced between the least and the
    largest of its tensor; it is one of the two next to it, drawn so that the mean is g (Konečný et al. 2016;
    Alistarh et al. 2017, *QSGD*).

    With error feedback (Stich, Cordonnier, Jaggi 2018, *Sparsified SGD with Memory*) a client adds to g what
    it has not sent before, e, and keeps g + e less what it sends; so the sum of all that it sent plus what it
    keeps is the sum of its updates. A reply that is lost on its way takes with it what it held. Without error
    feedback a random mask is multiplied by D/k, so that its mean is g.

    Args:
        spec: How; ``kind`` is not none.
    """

    def __init__(self, spec: UpdatesSpec) -> None:
        self._spec = spec

    @property
    def keeps(self) -> bool:
        """Whether clients keep what they have not sent."""
        return self._spec.feeds_back

    def written(
        self, origin: Member, params: Member, unsent: Member, seed: Sequence[int]
    ) -> tuple[Member, Member]:
        """Return what a client sends, and what it keeps.

        Args:
            origin: w⁰, floating point.
            params: w, of the same names and shapes; otherwise it is sent as it is, for the server to refuse.
            unsent: e, what the client has kept, 0 at first; empty without error feedback.
            seed: Of the draws, integers.

        Returns:
            Arrays by name: ``places`` (k,), int32 or int64, and ``values`` (k,); or ``seed`` (1,), int64,
            and ``values``; or ``codes``, uint8 (⌈D·bits/8⌉,), ``least`` and ``largest`` (T,); of 32 bits
            ``values`` (D,). And e by name, empty without error feedback. A client whose update is not finite
            keeps nothing of it.
        """
        if _shapes(params) != _shapes(origin):
            return params, dict(unsent)
        start, end = _flat(origin), _flat(params)
        if unsent:
            end = end + _flat({name: unsent[name] for name in origin})  # files sort their names
        if self._spec.kind == "quantised":
            return self._quantised(origin, start, end, seed), {}
        count = self._count(len(end))
        update = end - start
        if self._spec.kind == "top-k":
            magnitudes = update.abs().numpy()
            # In the order of their places, of which no more can be told apart than there are.
            chosen = np.sort(np.argpartition(-magnitudes, count - 1)[:count])
            places = torch.from_numpy(chosen)
            name, told = "places", places.to(torch.int32 if len(end) <= 2**31 else torch.int64)
        else:
            number = int(np.random.SeedSequence([*seed, _STREAM]).generate_state(1, np.uint64)[0] >> 1)
            places = _drawn(number, len(end), count)
            name, told = "seed", torch.tensor([number])
        values = end[places]
        if not self.keeps:
            if self._spec.kind == "random-mask":
                values = values + (len(end) / count - 1) * update[places]
            return {name: told, "values": values}, {}
        update[places] = 0
        kept = _shaped(update if update.isfinite().all() else torch.zeros_like(update), origin)
        return {name: told, "values": values}, kept

    def read(self, origin: Member, sent: Mapping[str, Tensor]) -> Member:
        """Return the parameters that a client sent.

        Args:
            origin: w⁰.
            sent: What :meth:`written` returned.

        Raises:
            ValueError: It is none of that.
        """
        start = _flat(origin)
        if self._spec.kind == "quantised":
            return _shaped(self._read_levels(origin, start, sent), origin)
        count = self._count(len(start))
        if self._spec.kind == "top-k":
            _expect(sent, {"places": (count,), "values": (count,)})
            places = sent["places"].long()
            if places.min() < 0 or places.max() >= len(start):
                raise ValueError(f"places: must be from 0 to {len(start) - 1}")
        else:
            _expect(sent, {"seed": (1,), "values": (count,)})
            if sent["seed"].is_floating_point() or (number := int(sent["seed"])) < 0:
                raise ValueError("seed: must be an integer from 0")
            places = _drawn(number, len(start), count)
        end = start.clone()
        end[places] = sent["values"].to(end.dtype)
        return _shaped(end, origin)

    def read_reply(self, origin: Member, reply: Message) -> Message:
        """Put a reply's parameters in the place of what was sent; what can't be read stays for screening."""
        if reply.has_error():
            return reply
        record = reply.content.array_records.get(MODEL)
        if record is not None and record.keys() != origin.keys():
            with suppress(ValueError):  # arrays of other names than were sent are refused for that
                reply.content[MODEL] = array_record(self.read(origin, member_from(record)), local=True)
        return reply

    def _count(self, size: int) -> int:
        return max(1, int(np.ceil(self._spec.share * size - 1e-9)))

    def _quantised(self, origin: Member, start: Tensor, end: Tensor, seed: Sequence[int]) -> Member:
        bits = self._spec.bits
        if bits == _WHOLE:
            return {"values": end}
        sizes = [value.numel() for value in origin.values()]
        pieces = (end - start).split(sizes)
        least = torch.stack([piece.min() for piece in pieces])
        largest = torch.stack([piece.max() for piece in pieces])
        stream = np.random.default_rng([*seed, _STREAM])
        levels = []
        for piece, low, high in zip(pieces, least.tolist(), largest.tolist(), strict=True):
            draws = stream.random(len(piece))
            step = (high - low) / (2**bits - 1)
            # In float64: a level of 16 bits and a draw together don't fit into float32.
            exact = (piece.double().numpy() - low) / step if step > 0 else np.zeros(len(piece))
            levels.append(np.floor(np.nan_to_num(exact, posinf=0, neginf=0) + draws))
        codes = np.concatenate(levels).clip(0, 2**bits - 1).astype(np.uint32)
        return {"codes": torch.from_numpy(_packed(codes, bits)), "least": least, "largest": largest}

    def _read_levels(self, origin: Member, start: Tensor, sent: Mapping[str, Tensor]) -> Tensor:
        bits, size, tensors = self._spec.bits, len(start), len(origin)
        if bits == _WHOLE:
            _expect(sent, {"values": (size,)})
            return sent["values"].to(start.dtype)
        _expect(sent, {"codes": (-(-size * bits // 8),), "least": (tensors,), "largest": (tensors,)})
        if sent["codes"].dtype != torch.uint8:
            raise ValueError("codes: must be uint8")
        levels = torch.from_numpy(_unpacked(sent["codes"].numpy(), bits, size))
        sizes = torch.tensor([value.numel() for value in origin.values()])
        low, high = sent["least"].double(), sent["largest"].double()
        step = ((high - low) / (2**bits - 1)).repeat_interleave(sizes)
        found: Tensor = start.double() + low.repeat_interleave(sizes) + levels * step
        return found.to(start.dtype)


def coding_of(spec: UpdatesSpec) -> UpdateCoding | None:
    """Return how updates are written, or None where parameters are sent as they are."""
    return None if spec.kind == "none" else UpdateCoding(spec)


def _shapes(member: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in member.items()}


def _expect(sent: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if _shapes(sent) != dict(shapes):
        raise ValueError(f"arrays of shapes {_shapes(sent)}: must be {dict(shapes)}")


def _flat(member: Member) -> Tensor:
    return torch.cat([value.flatten() for value in member.values()])


def _shaped(flat: Tensor, like: Member) -> Member:
    pieces = flat.split([value.numel() for value in like.values()])
    return {
        name: piece.reshape(value.shape).to(value.dtype)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def _drawn(seed: int, size: int, count: int) -> Tensor:
    """Return ``count`` of ``size`` places, int64, in their order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(size, count, replace=False)))


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (D,) below 2^bits as uint8 (⌈D·bits/8⌉,), each code's highest bit first."""
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    return np.packbits((codes[:, None] >> shifts & 1).astype(np.uint8))


def _unpacked(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Return what ``_packed`` was given, float64 (D,)."""
    found = np.unpackbits(packed, count=size * bits).reshape(size, bits)
    return found @ (2.0 ** np.arange(bits - 1, -1, -1))
