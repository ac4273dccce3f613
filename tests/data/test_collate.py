from omnimamba.data.collate import pad_right


def test_pad_right():
    assert pad_right([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    assert pad_right([[1, 2, 3], []], 9, multiple=2).tolist() == [[1, 2, 3, 9], [9, 9, 9, 9]]
    assert pad_right([[1, 2]], 9, multiple=2).shape == (1, 2)
