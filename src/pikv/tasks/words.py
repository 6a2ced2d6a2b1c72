"""The words that synthetic tasks are made of: adjectives, nouns and two-digit numbers."""

ADJECTIVES = tuple(
    """red blue green yellow black white brown golden silver grey pink purple orange pale dark bright
    quiet loud calm wild gentle proud brave shy clever foolish happy sad angry hungry sleepy busy
    tall short wide narrow deep shallow thick thin heavy light soft rough smooth sharp round square
    warm cold dry wet sweet bitter salty fresh old young ancient modern rich poor strange famous""".split()
)

NOUNS = tuple(
    """fox lake river mountain forest garden bridge castle tower village harbor island desert valley
    wolf bear horse eagle owl rabbit turtle spider dolphin tiger lion sheep goat duck swan crow
    lamp chair mirror candle basket bottle hammer ladder carpet blanket pillow kettle spoon anchor
    rose tulip maple cedar willow apple lemon cherry peach melon piano violin drum flute trumpet
    ship wagon train rocket tractor""".split()
)

NUMBERS = tuple(f"{number:02d}" for number in range(100))
