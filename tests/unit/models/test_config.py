"""A backbone's shape as earlier versions wrote it."""

from pretrain.models.config import upgrade_fields


def test_flat_fields_of_methods_go_to_their_sections():
    earlier = {"width": 16, "mediators": [4, 16], "density": "flexdit", "split": [1, 1, 1, 1], "sparsity": [0.3, 0.8]}
    assert upgrade_fields(earlier) == {
        "width": 16,
        "density": "flexdit",
        "mediators": {"numbers": [4, 16]},
        "flexdit": {"split": [1, 1, 1, 1], "sparsity": [0.3, 0.8]},
    }


def test_what_was_left_open_stays_so():
    assert upgrade_fields({"mediators": None, "split": None, "sparsity": None}) == {"mediators": None}


def test_todays_fields_are_as_they_are():
    today = {"mediators": {"numbers": [4]}, "flexdit": {"split": None, "sparsity": [0.3, 0.8]}, "depth": 8}
    assert upgrade_fields(today) == today
