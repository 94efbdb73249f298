"""Tables of accuracy out of the CSV files of comparisons."""

from fastconv.bench.tools import accuracies

LINES = """\
row,parameters,mult_adds,training_seconds,train_accuracy,validation_accuracy,test_accuracy
width 16,83674,2459296,180,0.5,0.55,0.56
width 16,83674,2459296,190,0.6,0.57,0.56
width 32,235434,6622368,50.55,0.7,0.6,0.595
"""


def test_seeds_of_a_row_become_a_mean_and_a_deviation(tmp_path):
    path = tmp_path / "homework.csv"
    path.write_text(LINES)
    columns = ["parameters", "mult-adds", "seconds", "training, %", "validation, %", "test, %", "seeds"]
    # The deviation of two is their distance, divided by the square root of two.
    assert accuracies.show(path, columns, with_lecture=True) == (
        "|  | parameters | mult-adds | seconds | training, % | validation, % | test, % | seeds |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| width 16 | 83,674 | 2.46 M | 185 | 55.00 ± 7.07 | 56.00 ± 1.41 | 56.00 ± 0.00 | 2 |\n"
        "| width 32 | 235,434 | 6.62 M | 50.5 | 70.00 | 60.00 | 59.50 | 1 |\n"
        "| the lecture, on its own GPU | 235,434 |  | 114 |  | 59.73 |  | 1 |"
    )
    assert accuracies.show(path, ["test, %"], with_lecture=False).splitlines()[-1] == "| width 32 | 59.50 |"
