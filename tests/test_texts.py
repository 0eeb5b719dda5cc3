import pytest
import torch

from wina.errors import CalibrationError
from wina.testing import tiny_tokenizer
from wina.texts import DOCUMENT_MARK, bundled, evenly, opening, to_windows


def test_bundled_texts_share_nothing() -> None:
    calibration, heldout = bundled("calibration") + bundled("learning"), bundled("heldout")
    assert len(calibration) == len(set(calibration)) > 200
    assert all(calibration)
    assert all(heldout)
    assert not any(DOCUMENT_MARK in text for text in calibration + heldout)
    sentences = {line for text in heldout for line in text.split(". ") if len(line) > 40}
    assert not any(sentence in text for text in calibration for sentence in sentences)


def test_windows_join_documents_with_end_of_sequence() -> None:
    tokenizer = tiny_tokenizer()
    windows = to_windows(["ab" * 10, "cd" * 10], tokenizer, 21)
    assert windows.shape == (2, 21)
    assert windows[0, -1] == tokenizer.eos_token_id
    assert tokenizer.decode(windows[1, :-1]) == "cd" * 10


def test_windows_are_taken_from_the_whole_text() -> None:
    ids = torch.arange(1000)
    windows = to_windows(ids, None, 50, tokens=200)
    assert windows.shape == (4, 50)
    assert windows[0, 0] == 0
    assert windows[-1, 0] > 700 or windows[-1, 0] == 750


def test_short_text_gives_one_short_window() -> None:
    assert to_windows(torch.arange(30), None, 512).shape == (1, 30)
    with pytest.raises(CalibrationError, match="15 tokens"):
        to_windows(torch.arange(15), None, 512)


def test_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = tiny_tokenizer(begins=True)
    assert opening(tokenizer).tolist() == [tokenizer.bos_token_id]
    windows = to_windows(["ab" * 10, "cd" * 10], tokenizer, 22)
    assert windows.shape == (2, 22)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(windows[1, 1:-1]) == "cd" * 10
    assert to_windows(["ab" * 10], tokenizer, 512).shape == (1, 22)
    assert to_windows(torch.arange(30), tokenizer, 30)[0, 0] == 0, "token ids are taken as they are"
    with pytest.raises(CalibrationError, match="no room"):
        to_windows(["ab" * 10], tokenizer, 1)


def test_windows_begin_with_text_where_the_tokenizer_puts_nothing_before() -> None:
    assert opening(tiny_tokenizer()).tolist() == []
    assert opening(None).tolist() == []


def test_windows_are_picked_evenly() -> None:
    windows = torch.arange(40).view(10, 4)
    assert evenly(windows, 8).tolist() == [[0, 1, 2, 3], [36, 37, 38, 39]]
    assert evenly(windows, 1).shape == (1, 4)
    assert evenly(windows, 100) is windows
