"""The parts of a run put together, and put together anew on SIGHUP: policy, processes, upstreams, cache, keys, log."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.errors import EnvironmentFault
from edgeft.router import load_policy
from edgeft.router.calibrate import suspend
from edgeft.serve.candidates import check, remote, spec_of
from edgeft.serve.config import Config
from edgeft.serve.local import LocalUpstream
from edgeft.serve.pool import NotReady, Pool
from edgeft.serve.proxy import Proxy
from edgeft.serve.upstream import HttpUpstream, Upstream
from edgeft.serve.watch import Watch

LOOK_EVERY_S = 5.0
GONE_S = 600.0  # streams of an upstream that was taken out may run so long
log = logging.getLogger("edgeft.serve")


class Running:
    """One run of the proxy. `proxy` is what requests see; a reload changes its fields between two requests."""

    def __init__(self, config: Config) -> None:
        """Check policy and artefacts. Raises UsageError."""
        self.config = config
        self.listen = config.listen  # as it is bound: a reload does not change it
        self.policy, self.candidates = checked(config)
        self.pool: Any = None
        self.proxy: Any = None

    def start(self) -> Any:
        """The application. Opens cache, keys and log; loads nothing yet."""
        from edgeft.serve.app import App
        from edgeft.serve.live import Live
        from edgeft.serve.run import open_cache, open_keys

        specs = [spec_of(c, self.config) for c in self.candidates if c["kind"] != "api"]
        engines = self.config.engines
        self.pool = Pool(specs, memory_bytes=engines.memory_bytes, idle_s=engines.idle_s)
        self.proxy = Proxy(
            self.policy,
            {},
            self.config,
            open_cache(self.config),
            semantic=open_semantic(self.config),
            keys=open_keys(self.config),
            live=Live(),
            log=open_log(self.config),
            decisions=open_decisions(self.config),
        )
        self.proxy.watch = watch_of(self.policy, self.config.policy)
        return App(self.proxy)

    async def load(self) -> list[str]:
        """Connect and load, cheapest first; each candidate is served from the moment it is ready. Raises EnvironmentFault."""
        for candidate in self.candidates:
            upstream = self.upstream(candidate)
            if isinstance(upstream, LocalUpstream) and self.preloaded(candidate["id"]):
                with console.step(f"loading {candidate['id']}"):
                    try:
                        await self.pool.preload([candidate["id"]])
                    except NotReady as error:
                        raise EnvironmentFault(str(error), f"less {upstream.spec.log}") from error
                async with upstream.hold():
                    pass  # what it can do is known from now on
            self.proxy.upstreams[candidate["id"]] = upstream
        return list(self.proxy.upstreams)

    def preloaded(self, candidate_id: str, config: Config | None = None) -> bool:
        """Whether a model is loaded when the proxy starts."""
        config = config or self.config
        own = config.model(candidate_id).preload
        return config.engines.preload if own is None else own

    def upstream(self, candidate: dict[str, Any]) -> Upstream:
        """What answers for a candidate."""
        if candidate["kind"] == "api":
            return remote(candidate, self.config)
        return LocalUpstream(
            self.pool, self.pool.entries[candidate["id"]].spec, self.config.engines.load_wait_s
        )

    async def reload(self, config: Config) -> None:
        """Take over a policy and settings. Requests that run keep what they began with. Raises EdgeftError, and nothing has changed.

        Listening, keys' database, cache and log stay as they were opened; models that did not change keep their process.
        """
        from edgeft.serve.run import open_keys, refuse_public

        refuse_public(replace(config, listen=self.listen))
        policy, candidates = await asyncio.to_thread(checked, config)
        keys = self.proxy.keys
        if config.keys.required and keys is None:
            keys = open_keys(config)
        specs = {c["id"]: spec_of(c, config) for c in candidates if c["kind"] != "api"}
        before = self.proxy.upstreams
        kept = self.unchanged(config, candidates, specs)
        fresh: dict[str, Upstream] = {
            c["id"]: remote(c, config) for c in candidates if c["kind"] == "api" and c["id"] not in kept
        }
        entries = []
        for name, spec in specs.items():
            if name not in kept:
                entries.append(await self.pool.prepared(spec, self.preloaded(name, config)))
                fresh[name] = LocalUpstream(self.pool, spec, config.engines.load_wait_s)
        # From here on nothing fails, and nothing waits.
        for entry in entries:
            self.pool.put(entry)
        for name in set(self.pool.entries) - set(specs):
            self.pool.drop(name)
        gone = {name: u for name, u in before.items() if name not in kept}
        self.config, self.policy, self.candidates = config, policy, candidates
        proxy = self.proxy
        proxy.upstreams = {
            c["id"]: before[c["id"]] if c["id"] in kept else fresh[c["id"]] for c in candidates
        }
        proxy.policy, proxy.config, proxy.keys = policy, config, keys
        proxy.watch = watch_of(policy, config.policy)
        if proxy.log and proxy.log.lines:
            proxy.log.lines.reopen()
        for name in gone:
            proxy.admissions.pop(name, None)
            proxy.breakers.pop(name, None)
        for admission in proxy.admissions.values():
            admission.waiting = config.limits.waiting
        asyncio.get_running_loop().call_later(
            GONE_S, lambda: [asyncio.ensure_future(u.aclose()) for u in gone.values()]
        )

    def unchanged(self, config: Config, candidates: list[dict[str, Any]], specs: dict[str, Any]) -> set[str]:
        """The candidates whose process or connections stay: the same artefact, run or reached the same way."""
        known = {c["id"]: c["artifact_sha256"] for c in self.candidates}
        found = set()
        for candidate in candidates:
            name = candidate["id"]
            if name not in self.proxy.upstreams or known.get(name) != candidate["artifact_sha256"]:
                continue
            if name in specs:
                same = self.pool.spec(name) == specs[name]
            else:  # the file of a key may hold another one
                same = self.config.model(name) == config.model(name) and config.model(name).key_file is None
            if same:
                found.add(name)
        return found

    async def look_after(self) -> None:
        """Ask those that failed whether they are back."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for name, upstream in list(self.proxy.upstreams.items()):
                breaker = self.proxy.breakers.get(name)
                if (
                    breaker
                    and breaker.failures
                    and isinstance(upstream, HttpUpstream)
                    and breaker.open_for_s()
                ):
                    try:
                        if await upstream.healthy():
                            breaker.half()
                    except Exception as error:
                        log.debug("health of %s: %s", name, type(error).__name__)

    async def aclose(self) -> None:
        """End the models."""
        if self.proxy:
            for upstream in self.proxy.upstreams.values():
                await upstream.aclose()
        if self.pool:
            await self.pool.aclose()


def checked(config: Config) -> tuple[Any, list[dict[str, Any]]]:
    """(policy, candidates as they lie here). Raises UsageError where one is missing or is not what was measured."""

    policy = load_policy(config.policy)
    for name in config.models:
        if name not in policy.candidates:
            from edgeft.errors import unknown

            raise unknown(
                "the model", name, policy.candidates, "models: in edgeft.yaml are the policy's candidates"
            )
    candidates = []
    for candidate in policy.candidates.values():
        own = config.model(candidate["id"]).path
        given = {**candidate, "path": str(own)} if own else candidate
        candidates.append(check(given, None if own else config.artifacts))
    return policy, candidates


def open_semantic(config: Config) -> Any:
    """The semantic cache, or None. Raises UsageError where its calibration is not of this encoder."""
    if not (config.cache.enabled and config.cache.semantic):
        return None
    from edgeft.serve.semantic import load

    return load(config.cache.semantic)


def open_decisions(config: Config) -> Any:
    """The log of decisions, or None."""
    from edgeft.serve.decisions import DecisionLog

    return DecisionLog(config.logs.decisions, config.logs.decision_texts) if config.logs.decisions else None


def watch_of(policy: Any, folder: Path | None = None) -> Watch:
    """Drift and budget of a policy; a suspension is written into its certificate where the folder is given."""
    return Watch(policy, (lambda why: suspend(folder, why)) if folder else None)


def open_log(config: Config) -> Any:
    """Where requests are written down, or None. Other records then go there too, as JSON."""
    if not config.logs.requests:
        return None
    from edgeft.serve.logs import setup

    place = config.logs.requests
    return setup(None if place == "stderr" else Path(place), quiet=console.output.quiet)
