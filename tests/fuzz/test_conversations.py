"""A short run of the fuzz test; ``conversations.py`` is the long one."""

import pytest
from plan import FAMILIES
from search import conversation_of, run

NUM_CONVERSATIONS = 64


@pytest.mark.parametrize("first", range(0, NUM_CONVERSATIONS, 8))
def test_conversations_end_in_success_or_clear_errors(first):
    for seed in range(first, first + 8):
        run(conversation_of(seed))


def test_conversations_are_the_same_every_time():
    assert conversation_of(7) == conversation_of(7)
    assert str(run(conversation_of(7))) == str(run(conversation_of(7)))


def test_the_short_run_covers_what_there_is():
    conversations = [conversation_of(seed) for seed in range(NUM_CONVERSATIONS)]
    assert {conversation.family for conversation in conversations} == set(FAMILIES)
    kinds = {operation.kind for conversation in conversations for operation in conversation.operations}
    assert kinds >= set("turn decode generate crop mark rewind save_and_load copy detour abuse compare".split())
    presses = " ".join(press for conversation in conversations for press in conversation.presses)
    words = "DecodingPress PrefillDecodingPress ProtectedPress PerLayerPress ComposedPress keyrotation( headwise( budget="
    assert all(word in presses for word in words.split())
