"""Update rules: from a capture to low-rank updates; and simple choices of layers.

``UpdateRule`` is the base of all rules, ``make_rule`` makes one by its name. ``closed_form`` holds
the built-in rules, ``moments`` their lifelong statistics, ``layer_choice`` the untrained ways of
choosing layers.
"""
