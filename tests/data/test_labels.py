import pytest

from hf_cka.data import label_ids


def test_names_count_before_numbers():
    assert label_ids(["a", "b"], {"b": 0, "A": 1}) == (1, 0)
    assert label_ids(["10", "2"], {"LABEL_2": 2, "LABEL_10": 10, **{f"LABEL_{i}": i for i in range(12)}}) == (10, 2)
    assert label_ids(["0", "1"], {"T-shirt/top": 0, "Trouser": 1}) == (0, 1)


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (["a", "b", "c"], {"LABEL_0": 0, "LABEL_1": 1}, "3 classes .* the model has 2 labels"),
        (["cat", "cow"], {"cat": 0, "dog": 1}, "classes cow are none of the model's labels .cat, dog."),
    ],
)
def test_classes_that_the_model_does_not_know_are_named(names, known, message):
    with pytest.raises(ValueError, match=message):
        label_ids(names, known)
