import warnings
from io import StringIO

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_ext.core.token_colors import WeightedText, save_png, shortened, to_html, to_rich, token_pieces


NAN = float("nan")
TEXT = "I don't like 😀 café, 好 film.\n\nReally !\n  two  spaces"


def trained(kind: str) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model, pre_tokenizer, decoder, trainer = {
        "byte-level": (
            models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet),
        ),
        "wordpiece": (
            models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
            trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"]),
        ),
        "unigram": (
            models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(),
            trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>"),
        ),
    }[kind]  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.train_from_iterator(["i don't like the film, café. really ! two spaces"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["byte-level", "wordpiece", "unigram"])
def test_pieces_are_the_decoded_text(kind):
    tokenizer = trained(kind)
    ids = tokenizer(TEXT)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    if kind == "byte-level":
        assert "".join(pieces) == TEXT
        # Four bytes make the face: it stands on the last of their tokens
        face = pieces.index("😀")
        assert pieces[face - 3 : face] == ["", "", ""] and ids[face - 3 : face + 1] == tokenizer("😀")["input_ids"]
    assert token_pieces(tokenizer, []) == []


def test_shortened_keeps_the_weights_in_view():
    text = WeightedText("t", [" aa"] * 10 + [" bb"] * 10, [NAN] * 10 + list(range(10)))
    assert shortened(text).pieces == text.pieces
    short = shortened(text, num_unweighted=7, num_weighted=9)
    assert short.pieces == ["… ", " aa", " aa", " bb", " bb", " bb", " …"]
    np.testing.assert_equal(short.weights, [NAN, NAN, NAN, 0, 1, 2, NAN])
    assert shortened(WeightedText("t", [" aa"] * 4, [NAN] * 4), num_unweighted=3).pieces == ["… ", " aa"]


def test_newlines_and_control_characters():
    text = WeightedText("t", ["a\n", "b\x1b[31m"], [1.0, 0.5])
    assert to_rich(text, 1.0).plain == "a↵\nb␛[31m"
    page = to_html([text], "h")
    assert "a↵<br></span>" in page


def test_dark_colours_carry_white_text():
    text = WeightedText("t", ["dark", "light"], [1.0, 0.05])
    page = to_html([text], "h")
    assert 'color:#ffffff" title="1.000"' in page and 'color:#222222" title="0.050"' in page
    dark, light = (str(span.style) for span in to_rich(text, 1.0).spans)
    assert dark.startswith("#ffffff on") and light.startswith("#222222 on")
    stream = StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor").print(to_rich(text, 1.0))
    assert "38;2;255;255;255" in stream.getvalue()


def test_picture_of_a_newline_and_of_foreign_letters(tmp_path):
    def picture(piece: str) -> np.ndarray:
        save_png([WeightedText("t", ["a", piece, "b"], [0.0, 1.0, 0.0])], "h", tmp_path / "a.png")
        return matplotlib.image.imread(tmp_path / "a.png")[..., :3]

    # The newline's own weight shows: dark red somewhere left of the colour bar
    drawn = picture("\n")[:, :1200]
    assert ((drawn[..., 0] > 0.5) & (drawn[..., 1] < 0.2) & (drawn[..., 2] < 0.3)).sum() > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture("好\t😀").std() > 0.01


def test_picture_of_many_long_texts_stays_drawable(tmp_path):
    long = WeightedText("long", [" prompt"] * 3000 + [" word"] * 3000, [NAN] * 3000 + [0.5] * 3000)
    save_png([long], "h", tmp_path / "long.png")
    assert matplotlib.image.imread(tmp_path / "long.png").shape[0] < 3000
