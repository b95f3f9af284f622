"""Which network interface the workers of a node talk over.

gloo binds to whatever the machine's host name resolves to unless it is told an interface: on many machines that is
127.0.1.1, which no other node reaches, and the workers wait for each other until a time limit. The right one is the
interface that holds the address under which the cluster knows the node.
"""

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # NCCL takes a bare name as the start of names


def interface_of(address: str) -> str | None:
    """Return the name of the interface that holds an IP address, or is the way to it on this machine; None if none."""
    wanted = ipaddress.ip_address(address)
    for name, found in interfaces().items():
        if any(ipaddress.ip_interface(each).ip == wanted for each in found):
            return name
    if wanted.is_loopback:  # 127.0.0.2 works on every Linux, though only 127.0.0.1 is named
        return next((name for name, found in interfaces().items() if any(map(_is_loopback, found))), None)
    return None


def address_of(name: str) -> str | None:
    """Return the IP address that an interface of this machine binds to, version 4 before 6; None if it has none."""
    found = [ipaddress.ip_interface(each).ip for each in interfaces().get(name, ())]
    usable = [address for address in found if not address.is_link_local]
    return str(min(usable, key=lambda address: address.version)) if usable else None


def interfaces() -> dict[str, list[str]]:
    """Return name -> addresses with their networks, such as 10.0.0.3/24, of the interfaces that are up."""
    is_up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {name: _addresses(found) for name, found in psutil.net_if_addrs().items() if name in is_up}


def host_address() -> str:
    """Return what the host name resolves to, which gloo takes where no interface is known; "" if to nothing."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def environment(name: str) -> Mapping[str, str]:
    """Return the variables that make gloo and NCCL use an interface."""
    return {variable: form.format(name) for variable, form in VARIABLES.items()}


def _addresses(found: Sequence[object]) -> list[str]:
    texts = []
    for each in found:
        family, address, netmask = each.family, each.address, each.netmask  # type: ignore[attr-defined]
        if family == socket.AF_INET:
            texts.append(f"{address}/{netmask}" if netmask else f"{address}/32")
        elif family == socket.AF_INET6:
            texts.append(f"{address.partition('%')[0]}/128")
    return texts


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_interface(text).ip.is_loopback
