"""Metrics of several processes as one."""

from uproxy.metrics import counters, summed

ONE = b"""# HELP a_total A
# TYPE a_total counter
a_total{x="1 2"} 3
# HELP h H
# TYPE h histogram
h_bucket{le="+Inf"} 2
h_sum 0.250
h_count 2
# HELP istio_build Istio component build info
# TYPE istio_build gauge
istio_build{component="uproxy",tag="1"} 1
# HELP g G
# TYPE g gauge
g 1
"""
OTHER = b"""# HELP a_total A
# TYPE a_total counter
a_total{x="1 2"} 4
a_total{x="y"} 1
# HELP g G
# TYPE g gauge
g 2.5
"""


def test_samples_of_one_name_and_labels_are_added_up_below_one_head():
    assert (
        summed([ONE, b"", OTHER])
        == b"""# HELP a_total A
# TYPE a_total counter
a_total{x="1 2"} 7
a_total{x="y"} 1
# HELP h H
# TYPE h histogram
h_bucket{le="+Inf"} 2
h_sum 0.25
h_count 2
# HELP istio_build Istio component build info
# TYPE istio_build gauge
istio_build{component="uproxy",tag="1"} 1
# HELP g G
# TYPE g gauge
g 3.5
"""
    )
    assert b'tag="1"} 1\n' in summed([ONE, ONE])


def test_of_a_process_that_has_ended_its_counters_stay():
    assert b"gauge" not in counters(ONE)
    assert counters(ONE).startswith(b'# HELP a_total A\n# TYPE a_total counter\na_total{x="1 2"} 3\n# HELP h H')


def test_what_cannot_be_read_as_a_number_of_samples_stays_as_it_is():
    nan = b"# HELP g G\n# TYPE g gauge\ng nan\n"
    assert summed([nan]) == nan
