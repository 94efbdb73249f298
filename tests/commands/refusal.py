"""What a command does with bad input."""

import re


def refused(result, message):
    code, _out, err = result
    assert code == 2
    assert "Traceback" not in err
    # The frame that usage errors are printed in breaks lines.
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())), err
