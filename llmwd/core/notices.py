"""What people are told: a pure function from the workers' facts to notices.

Theory of operation. Three things are told about: the server, the tunnel and our own workers (`About`). For each, facts are reduced to a
situation with a key; a notice is due when the key differs from the last one noticed. Situations that people need not
hear of (loading, waiting for GPUs) have no key and leave the last one standing. What was noticed is kept on disk
(`Told`) with the notices that wait (core/outbox), so that the notifier's next incarnation repeats nothing.
"""

from enum import StrEnum

import msgspec

from llmwd.core.tunnelconfig import NONE
from llmwd.core.wording import name_gpus
from llmwd.messages import GpusFact, Revocation, ServerFact, TunnelFact, WorkerState
from llmwd.vocab import Event, NodePhase, Phase, Reason

STOPPED = "stopped"
YIELD_HOLD_S = 3.0  # a release takes less: then one notice says both that and how fast
TUNNEL_DOWN_HOLD_S = 15.0  # a connection that comes back by then is nobody's concern
TUNNEL_ABSENT_AFTER_S = 120.0  # a first connection may take so long
HELD_BY_HOLD_S = 3.0  # by then the resolver has said who holds
HELD, HELD_UNNAMED = "held", "held?"

# Why a server ends, or is not there, that is no yield: the operator's own wish, or its own failure, of which other notices
# tell. All other reasons are, those as well that are still to come: better told with few words than not at all.
NO_YIELDS = frozenset(
    {Reason.ready, Reason.loading, Reason.starting, Reason.resume_delay, Reason.held, Reason.budget_broken, Reason.switching,
     Reason.not_wanted, Reason.config_error, Reason.server_backoff, Reason.server_failed, Reason.worker_failed,
     Reason.stopping, Reason.stopped}
)  # fmt: skip
YIELDS = frozenset(Reason) - NO_YIELDS


class About(StrEnum):
    server = "server"
    tunnel = "tunnel"
    workers = "workers"


class Told(msgspec.Struct, frozen=True):
    """The key of the last situation of each, "" for none; profile: the last that was served."""

    server: str = ""
    tunnel: str = ""
    workers: str = ""
    profile: str = ""


class Notice(msgspec.Struct, frozen=True):
    """One thing to tell. about, key: None, "" for what is no situation; profile: of a model that is served now; alarm:
    more urgent than others; hold_s: not to be sent before, in case it is replaced; log: the file in the folder of logs
    whose last lines belong to it."""

    about: About | None
    key: str
    title: str
    message: str
    tag: str
    event: Event
    profile: str = ""
    alarm: bool = False
    hold_s: float = 0.0
    log: str = ""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The latest facts. holding: the server's last one with processes on GPUs; gone_s: when there were none
    after it; door: the tunnel stays up while the model is away; out_s: since when it should be connected and is not."""

    node: str
    server: ServerFact | None = None
    holding: ServerFact | None = None
    gone_s: float | None = None
    tunnel: TunnelFact | None = None
    out_s: float | None = None
    gpus: GpusFact | None = None
    workers: tuple[WorkerState, ...] = ()
    door: bool = False


def heard(seen: Seen, fact: ServerFact) -> Seen:
    """A fact of the vLLM manager has arrived."""
    if fact.holding:
        return msgspec.structs.replace(seen, server=fact, holding=fact, gone_s=None)
    gone_s = fact.at_s if seen.gone_s is None and seen.holding is not None else seen.gone_s
    return msgspec.structs.replace(seen, server=fact, gone_s=gone_s)


def heard_of_tunnel(seen: Seen, fact: TunnelFact) -> Seen:
    """A fact of the tunnel manager has arrived."""
    due = fact.phase in (Phase.starting, Phase.backoff) or (fact.phase is Phase.stopped and seen.door and _is_meant(fact))
    out_s = None if not due else fact.at_s if seen.out_s is None else seen.out_s
    return msgspec.structs.replace(seen, tunnel=fact, out_s=out_s)


def consider(told: Told, seen: Seen) -> tuple[Notice, ...]:
    """The notices that are due after what was told (or is about to be)."""
    due = []
    server = _server(told, seen)
    if server is not None and server.key != told.server:
        due.append(server)
    tunnel = _tunnel(told, seen)
    if tunnel is not None and tunnel.key != told.tunnel:
        due.append(tunnel)
    workers = _workers(seen)
    if workers.key != told.workers:
        due.append(workers)
    return tuple(due)


def after(told: Told, notice: Notice) -> Told:
    """What has been told once the notice is."""
    if notice.about is None:
        return told
    if notice.about is About.tunnel:
        return msgspec.structs.replace(told, tunnel=notice.key)
    if notice.about is About.workers:
        return msgspec.structs.replace(told, workers=notice.key)
    if notice.key == STOPPED:  # what is told about these begins anew with the next start
        return Told(server=STOPPED, profile=told.profile)
    return msgspec.structs.replace(told, server=notice.key, profile=notice.profile or told.profile)


def stopped(node: str) -> Notice:
    """llmwd ends on this node."""
    text = "No model is served here until it is started again."
    return Notice(About.server, STOPPED, f"Stopped: llmwd on {node}", text, "octagonal_sign", Event.stopped)


# --- the server ------------------------------------------------------------------------------------------


def _server(told: Told, seen: Seen) -> Notice | None:
    server = seen.server
    if server is None:
        return None
    match server.node_phase:
        case NodePhase.serving:
            return _serving(told, seen, server)
        case NodePhase.yielding if server.reason in YIELDS:
            return _yielding(seen, server)
        case NodePhase.waiting if server.reason is Reason.server_backoff:
            title, text = f"vLLM ended by itself on {seen.node}", f"It is started again. {server.detail}".strip()
            return Notice(About.server, "crashed", title, text, "boom", Event.crashed, alarm=True)
        case NodePhase.waiting:
            return _yielded(told, seen, server)
        case NodePhase.held:
            return _held(told, seen, server)
        case NodePhase.failed:
            text = f"{_sentence(server.reason.meaning)} {server.detail}".strip()
            return Notice(
                About.server, f"failed:{server.reason}", f"Failed on {seen.node}", text, "rotating_light", Event.failed,
                alarm=True, log="server.log" if server.reason is Reason.server_failed else "",
            )  # fmt: skip
    return None


def _serving(told: Told, seen: Seen, server: ServerFact) -> Notice:
    profile = server.profile or server.model_name or "a model"
    # ready_at names this very server: a restarted manager keeps it, a new server has another.
    key = f"serving:{profile}:{server.ready_at or 0:.3f}"
    text = f"{server.model_name or profile} answers on {_gpus(server.holding)} {_where(seen, server)}"
    if told.profile and told.profile != profile:
        event, title, text = Event.switched, f"Switched to {profile} on {seen.node}", f"{text} (before: {told.profile})"
    elif told.server.startswith(("yield", "held", "crashed", "failed")):
        event, title = Event.resumed, f"Resumed: {profile} on {seen.node}"
    else:
        event, title = Event.serving, f"Serving {profile} on {seen.node}"
    return Notice(About.server, key, title, text, "white_check_mark", event, profile=profile)


def _where(seen: Seen, server: ServerFact) -> str:
    """The public address counts once the tunnel is connected; one that has failed, or is not meant to be, never."""
    tunnel, local = seen.tunnel, f"at {server.url or 'no address'}"
    if tunnel is None or not _is_meant(tunnel) or tunnel.phase is Phase.failed:
        return local
    public = f"at https://{tunnel.hostname}" if tunnel.hostname else f"through {_place(seen, tunnel)}"
    return public if tunnel.phase is Phase.ready else f"{local}, and will answer {public} once that is connected"


def _yielding(seen: Seen, server: ServerFact) -> Notice:
    text = f"{_gpus(server.holding)} are being given back. {_why(seen, server)}"
    return Notice(
        About.server, f"yielding:{server.lease_epoch}", _to_whom("Yielding", seen, server), text,
        "hourglass_flowing_sand", Event.yielding, hold_s=YIELD_HOLD_S,
    )  # fmt: skip


def _yielded(told: Told, seen: Seen, server: ServerFact) -> Notice | None:
    """A release is over. It may have been so quick that its beginning went unseen."""
    before, revocation = seen.holding, _revocation(seen)
    noticed = told.server.startswith("yielding:")
    unseen = told.server.startswith("serving:") and (
        server.reason in YIELDS or (revocation is not None and revocation.reason in YIELDS)
    )
    if server.holding or not (noticed or unseen):
        return None
    key = told.server.replace("yielding:", "yielded:").replace("serving:", "yielded:")
    gone = _gpus(before.holding) if before is not None else "The GPUs"
    told_of = before if before is not None and before.reason in YIELDS else server
    text = f"{gone} were given back{_took(seen)}. {_why(seen, told_of)}"
    return Notice(About.server, key, _to_whom("Yielded", seen, told_of), text, "hourglass_flowing_sand", Event.yielding)


def _took(seen: Seen) -> str:
    """How long the release took, if this incarnation of the notifier has seen it."""
    revocation = _revocation(seen)
    if revocation is None or seen.gone_s is None:
        return ""
    if revocation.seen_s is not None:
        return f" {max(0.0, seen.gone_s - revocation.seen_s):.2f} s after the job was seen"
    return f" {max(0.0, seen.gone_s - revocation.revoked_s):.2f} s after the decision"


def _revocation(seen: Seen) -> Revocation | None:
    """The one that ended the server's lease."""
    revocation = seen.gpus.revocation if seen.gpus is not None else None
    same = revocation is not None and seen.holding is not None and revocation.epoch == seen.holding.lease_epoch
    return revocation if same else None


def _to_whom(doing: str, seen: Seen, server: ServerFact) -> str:
    revocation = _revocation(seen)
    if revocation is not None and revocation.job:
        user = next((claim.user for claim in seen.gpus.claims if claim.id == revocation.job), "")
        return f"{doing} to Slurm job {revocation.job}{f' of {user}' if user else ''} on {seen.node}"
    return f"{doing} to a Slurm job on {seen.node}" if server.reason is Reason.yielded_to_job else f"{doing} on {seen.node}"


def _why(seen: Seen, server: ServerFact) -> str:
    revocation = _revocation(seen)
    detail = server.detail or (revocation.detail if revocation is not None else "")
    return _sentence(detail or server.reason.meaning)


def _held(told: Told, seen: Seen, server: ServerFact) -> Notice | None:
    # The kind is the manager's to say: a notifier that has just begun may not have heard of the hold itself yet.
    if server.reason is not Reason.held:
        text = _sentence(server.detail or server.reason.meaning) + " llmwd stays away from the GPUs until `llmwd-ctl resume`."
        what = "Budget broken" if server.reason is Reason.budget_broken else "Not certain of the GPUs"
        return Notice(
            About.server, f"held:{server.reason}", f"{what} on {seen.node}", text, "rotating_light", Event.budget, alarm=True
        )
    hold = seen.gpus.hold if seen.gpus is not None else None
    if hold is None and told.server == HELD:
        return None  # it was told, with the name
    by = f" by {hold.by}" if hold is not None and hold.by else ""
    text = "llmwd stays away from the GPUs until `llmwd-ctl resume`"
    text += " or the time is over." if hold is not None and hold.until_at is not None else "."
    # Until the resolver is heard of, nothing tells by whom: that comes within this time, in the place of this.
    key, hold_s = (HELD, 0.0) if hold is not None else (HELD_UNNAMED, HELD_BY_HOLD_S)
    return Notice(About.server, key, f"Held{by} on {seen.node}", text, "hand", Event.held, hold_s=hold_s)


def _gpus(gpus: tuple[int, ...]) -> str:
    return name_gpus(gpus) if gpus else "its GPUs"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…")) else ".")


# --- the tunnel --------------------------------------------------------------------------------------------


def _tunnel(told: Told, seen: Seen) -> Notice | None:
    tunnel = seen.tunnel
    if tunnel is None or not _is_meant(tunnel):
        return None
    place, text = _place(seen, tunnel), f"From {seen.node}: {tunnel.detail or 'no connection to Cloudflare'}"
    if tunnel.phase is Phase.ready:
        return Notice(
            About.tunnel, "up", f"Tunnel up: {place}", f"Connected from {seen.node}.", "globe_with_meridians", Event.tunnel
        )
    if tunnel.phase is Phase.failed:
        return Notice(
            About.tunnel, "failed", f"Tunnel failed: {place}", text, "rotating_light", Event.tunnel, alarm=True
        )
    if seen.out_s is None:
        return None  # draining, and stopped with the server, which it follows: of that the other notice tells
    if told.tunnel == "up" and (seen.door or _serves(seen)):
        return Notice(
            About.tunnel, "down", f"Tunnel down: {place}", text, "warning", Event.tunnel, hold_s=TUNNEL_DOWN_HOLD_S
        )
    # The facts are repeated, so this is seen in time, with the last error that there was.
    if told.tunnel not in ("up", "down") and tunnel.at_s - seen.out_s >= TUNNEL_ABSENT_AFTER_S:
        return Notice(About.tunnel, "absent", f"Tunnel not connected: {place}", text, "warning", Event.tunnel)
    return None


def _is_meant(tunnel: TunnelFact) -> bool:
    """Whether there is to be one. The mode is what tells: a token's tunnel needs no hostname here."""
    return tunnel.mode != NONE if tunnel.mode else bool(tunnel.hostname)


def _place(seen: Seen, tunnel: TunnelFact) -> str:
    return f"https://{tunnel.hostname}" if tunnel.hostname else f"the tunnel of {seen.node}"


def _serves(seen: Seen) -> bool:
    return seen.server is not None and seen.server.node_phase is NodePhase.serving


# --- the workers -------------------------------------------------------------------------------------------


def _workers(seen: Seen) -> Notice:
    """Those in quarantine, by the root's fact."""
    failed = [worker for worker in seen.workers if worker.phase is Phase.failed]
    if not failed:
        text = f"No worker of llmwd is in quarantine any more on {seen.node}."
        return Notice(About.workers, "", f"Workers again on {seen.node}", text, "white_check_mark", Event.quarantined)
    names = ", ".join(worker.name for worker in failed)
    text = " ".join(f"{worker.name} ended again and again ({worker.detail})." for worker in failed)
    return Notice(
        About.workers, names, f"In quarantine on {seen.node}: {names}", f"{text} `llmwd-ctl reset` starts it again.",
        "rotating_light", Event.quarantined, alarm=True, log=f"{failed[-1].name}.log",
    )  # fmt: skip
