"""What waits to be published: groups, whose turn comes in order."""

from control.server.pending import Pending


def test_nothing_waits_at_first():
    pending = Pending()
    assert not pending
    assert pending.take() == frozenset()


def test_groups_come_in_order_and_soon_before_later():
    pending = Pending()
    pending.add({"audit": ["a"], "both": ["b"]}, soon=False)
    pending.add({"second": ["c"]}, soon=True)
    pending.add({"both": ["d"], "second": ["e"]}, soon=True)
    assert pending
    assert [pending.take() for _ in range(4)] == [{"c", "e"}, {"b", "d"}, {"a"}, frozenset()]
    assert not pending


def test_clearing_forgets_everything():
    pending = Pending()
    pending.add({"a": ["a"]}, soon=True)
    pending.add({"b": ["b"]}, soon=False)
    pending.clear()
    assert not pending
