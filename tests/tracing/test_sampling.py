from __future__ import annotations

import torch

from skillfast.tracing.sampling import _bytes_of, _rows_of


def test_batches_of_any_form_are_counted():
    images, labels = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    for batch in ((images, labels), [images, labels], {"x": images, "more": (labels,)}, ("a name", [images], labels)):
        assert _bytes_of(batch) == 5 * 3 * 4 + 5 * 8
        assert _rows_of(batch) == 5
    assert _bytes_of("a name") == _rows_of(torch.tensor(1.0)) == 0
