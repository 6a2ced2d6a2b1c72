"""Tokenizers for tiny models: words ``w4`` to ``w96``, and byte pairs."""

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from tiny import VOCABULARY, batch_of

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% if not enable_thinking %}(briefly) {% endif %}{% endif %}"
)


def word_tokenizer():
    """A word of the vocabulary is a token, any other one is unknown."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(num_words, seed=0):
    """A text of random words."""
    return " ".join(f"w{index}" for index in batch_of([num_words], seed=seed)[0][0].tolist())


def byte_pair_tokenizer():
    """A tokenizer that knows all text, with a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["Who signed the contract?\n\nThe mayor signed.\n"] * 4, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )
