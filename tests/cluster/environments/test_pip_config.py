# SPDX-License-Identifier: Apache-2.0
"""The host's pip configuration, in the words of the installer."""

from xinference.cluster.environments.pip_config import options_of

LISTING = """\
global.extra-index-url='https://a.example/simple https://b.example/simple'
global.index-url='https://first.example/simple'
global.timeout='60'
install.find-links='/wheels\\n/more'
site.index-url='https://site.example/simple'
:env:.index-url='https://last.example/simple'
:env:.trusted-host='last.example'
:env:.cert='/etc/ca.pem'
nonsense
"""


def test_it_means_the_same_and_the_last_word_counts() -> None:
    options, environment = options_of(LISTING)

    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert [value for flag, value in pairs if flag == "--default-index"] == [
        "https://last.example/simple"
    ]
    assert [value for flag, value in pairs if flag == "--index"] == [
        "https://a.example/simple",
        "https://b.example/simple",
    ]
    assert [value for flag, value in pairs if flag == "--find-links"] == ["/wheels", "/more"]
    assert ("--allow-insecure-host", "last.example") in pairs
    assert environment == {"SSL_CERT_FILE": "/etc/ca.pem"}


def test_without_a_configuration_there_is_nothing_to_say() -> None:
    assert options_of("") == ([], {})
