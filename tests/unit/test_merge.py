"""Tests of the merge rule."""

from itertools import product

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.merge import is_better, merge, rank
from synapse_roomkeys.types import KeyMetadata, Replacement, RoomKey, StoredKey

VALUES = [
    KeyMetadata(index, forwarded, verified)
    for index, forwarded, verified in product((1, 2), (3, 4), (False, True))
]
#: Stored rows that older servers accepted: with a NULL, or without session data.
UNSOUND = [
    StoredKey(KeyMetadata(None, 0, True), True, 8),
    StoredKey(KeyMetadata(0, None, True), True, 8),
    StoredKey(KeyMetadata(0, 0, None), True, 8),
    StoredKey(KeyMetadata(0, 0, True), False, 8),
    StoredKey(KeyMetadata(None, None, None), False, 8),
]
WORST = KeyMetadata(2**31 - 1, 2**31 - 1, False)


def wins(new: KeyMetadata, old: KeyMetadata) -> bool:
    """The merge rule, written as three comparisons in their order."""
    if new.is_verified != old.is_verified:
        return bool(new.is_verified)
    if new.first_message_index != old.first_message_index:
        return (new.first_message_index or 0) < (old.first_message_index or 0)
    return (new.forwarded_count or 0) < (old.forwarded_count or 0)


def room_key(session_id: str, metadata: KeyMetadata) -> RoomKey:
    """A key of a room with this session id and metadata."""
    return RoomKey("!room", session_id, metadata, '"data"')


class IsBetterTests(SynchronousTestCase):
    """Tests of `is_better`, which compares two keys."""

    def test_the_rule_holds_for_all_pairs(self) -> None:
        """A verified key is better, then the lower index, then the lower forwarded
        count."""
        for new, old in product(VALUES, VALUES):
            self.assertEqual(
                is_better(new, StoredKey(old, True, 8)), wins(new, old), f"{new} {old}"
            )

    def test_two_keys_never_replace_each_other(self) -> None:
        """Of two different keys, exactly one is better than the other, and of two equal
        keys none is."""
        for one, other in product(VALUES, VALUES):
            both = [
                is_better(one, StoredKey(other, True, 8)),
                is_better(other, StoredKey(one, True, 8)),
            ]
            self.assertEqual(sum(both), 0 if one == other else 1)

    def test_any_key_beats_an_unsound_row(self) -> None:
        """Any key is better than a stored row with a NULL or without session data."""
        for old in UNSOUND:
            self.assertTrue(is_better(WORST, old), old)

    def test_null_ranks_as_zero(self) -> None:
        """A NULL ranks as 0 or false."""
        self.assertEqual(
            rank(KeyMetadata(None, None, None)), rank(KeyMetadata(0, 0, False))
        )


class MergeTests(SynchronousTestCase):
    """Tests of `merge`, which compares the keys of an upload with the stored keys."""

    def test_new_and_better_keys_are_written(self) -> None:
        """New keys and better keys are written in the order of the upload, and worse
        and equal keys are counted as unchanged."""
        good, bad = KeyMetadata(0, 0, True), KeyMetadata(5, 5, False)
        stored = {
            0: StoredKey(bad, True, 8),
            1: StoredKey(good, True, 8),
            3: StoredKey(good, True, 8),
        }
        better, new = room_key("better", good), room_key("new", bad)
        uploads = [better, room_key("equal", good), new, room_key("worse", bad)]
        plan = merge(stored, uploads)
        self.assertEqual(plan.writes, (better, new))
        self.assertEqual(len(plan.new), 1)
        self.assertEqual(plan.unchanged, 2)
        data = better.session_data
        self.assertEqual(plan.added_bytes, 2 * len(data) - 8)
        self.assertEqual(plan.replaced, (Replacement("!room", "better", bad, good),))
