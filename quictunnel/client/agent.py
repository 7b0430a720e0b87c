"""The agent: keeps a session's links alive, for ever.

One keeper task per link dials, says hello, watches, and dials again. A link that has been silent is *suspect*:
another is dialled beside it at once and takes the new work, while the old one lives on until it really fails, because
its late answers still count.
"""

import asyncio
import random
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from loguru import logger

from quictunnel import __version__
from quictunnel.client.fan_out import FanOut
from quictunnel.log import escape
from quictunnel.quic.dial import DialError, dial
from quictunnel.quic.engine import ClientTrust, Engine
from quictunnel.quic.link import SUSPECT_AFTER, Link, LinkClosed, LinkOwner
from quictunnel.quic.sockets import settle
from quictunnel.quic.stream import StreamLeg
from quictunnel.trust.certificates import diagnose, pinned_authority
from quictunnel.trust.files import TrustError
from quictunnel.wire.control import (
    VERSION,
    Authority,
    ControlMessage,
    Drain,
    Drained,
    Grow,
    Health,
    Hello,
    Refuse,
    Unknown,
    Welcome,
)
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode
from quictunnel.wire.frames import RequestHead
from quictunnel.wire.names import normalise_tunnel_name

__all__ = ["Agent", "AgentConfig", "FinalRefusal"]

PING_EVERY: Final = 1.5
DIAL_TIME: Final = 5.0
ANSWER_TIME: Final = 10.0
FIRST_RETRY: Final = 0.2
LONGEST_RETRY: Final = 15.0
"seconds, all of them"

_SHOWN: Final = 300
"characters of what a server says that people are shown"


class FinalRefusal(Exception):
    """Trying again is pointless: ``code`` is a word for programs."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


class _TryLater(Exception):
    """The server refused for now."""

    def __init__(self, text: str, retry_after: float | None) -> None:
        self.retry_after = retry_after
        super().__init__(text)


DEFAULT_BUDGET: Final = 32 * 1024 * 1024
"bytes that receive windows grow by together when nobody says how many"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Whom to dial and what to say there."""

    host: str
    port: int
    server_name: str
    token: str = field(repr=False)
    tunnel: str = ""
    "empty: the server gives a name"

    authority: bytes | None = None
    "the CA's certificate (PEM) that the server's must come from; None with no pin: the system's CAs"

    pin: bytes | None = None
    "SHA-256 of the CA certificate (DER) that the server will send; it is fetched once and then verified against"

    max_links: int = 64
    capabilities: tuple[str, ...] = ()
    "words of the protocol for what this client takes beyond plain requests"


class Backoff:
    """Delays that grow to a limit, jittered so that a thousand clients do not come back at once."""

    def __init__(self) -> None:
        self._next = FIRST_RETRY

    def reset(self) -> None:
        """The last attempt was a success."""
        self._next = FIRST_RETRY

    def delay(self) -> float:
        """Seconds to wait before the next attempt."""
        delay = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, LONGEST_RETRY)
        return delay


class Agent(LinkOwner):
    """One session of a tunnel."""

    def __init__(
        self,
        config: AgentConfig,
        engine: Engine,
        fan_out: FanOut,
        *,
        budget: WindowBudget | None = None,
        on_welcome: Callable[[Welcome], None] | None = None,
    ) -> None:
        """``budget`` is what receive windows grow out of.

        ``on_welcome`` is called each time the session comes to be served, with what the server said.
        """
        self._config = config
        self._engine = engine
        self._fan_out = fan_out
        self._on_welcome = on_welcome
        self._budget = budget or WindowBudget(DEFAULT_BUDGET)
        # Who knows this id is this session: it replaces its own ghost by it, so it is as good as a secret.
        self._session = secrets.token_urlsafe(24)
        self._authority = config.authority
        self._links: dict[int, Link] = {}
        self._closed: dict[Link, asyncio.Event] = {}
        self._open_links: set[Link] = set()  # those whose sockets are open, a moment longer than the links
        self._answers: dict[Link, asyncio.Future[ControlMessage]] = {}
        self._wanted = 1
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._stopping = asyncio.Event()
        self.tunnel = config.tunnel
        self.welcomed = asyncio.Event()  # there has been a welcome
        self.serving = False

    # The agent's life

    async def run(self) -> None:
        """Serve until ``stop``. Raises FinalRefusal when the server will never have this client."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._start_keepers()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._group = None
            for link in list(self._open_links):
                link.close(ErrorCode.NO_ERROR, "the client stops")
                link.abandon(LinkClosed(0, ""))
            await settle()

    async def stop(self, grace: float) -> None:
        """Take nothing new, finish what is under way within ``grace`` seconds, and leave."""
        links = [link for link in self._closed if link.closed is None]
        for link in links:
            link.send_control(Drain())
        deadline = asyncio.get_running_loop().time() + grace
        # The server's last streams may be on their way when it reads the drain: idle once is not yet done.
        idle = 0
        while idle < 3 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05 + max((link.round_trip or 0.0 for link in links), default=0.0))
            idle = 0 if any(link.exchanges for link in links) else idle + 1
        self._stopping.set()
        for keeper in self._keepers.values():
            keeper.cancel()

    # Keeping links

    def _start_keepers(self) -> None:
        for index in range(self._wanted):
            if index not in self._keepers and self._group is not None and not self._stopping.is_set():
                keeper = self._group.create_task(self._keep(index), name=f"link {index}")
                self._keepers[index] = keeper
                keeper.add_done_callback(partial(self._keeper_done, index))

    def _keeper_done(self, index: int, keeper: asyncio.Task[None]) -> None:
        del self._keepers[index]

    async def _keep(self, index: int) -> None:
        backoff = Backoff()
        while index < self._wanted and not self._stopping.is_set():
            try:
                link = await self._open(index)
            except DialError as error:
                if error.untrusted:
                    error = DialError(await self._why_untrusted(error))
                    if not self.welcomed.is_set():
                        raise FinalRefusal("untrusted", str(error)) from None
                await self._wait(backoff.delay(), index, error)
                continue
            except _TryLater as error:
                await self._wait(min(max(backoff.delay(), error.retry_after or 0.0), LONGEST_RETRY), index, error)
                continue
            except (FinalRefusal, asyncio.CancelledError):
                raise
            except Exception as error:
                # A fault of ours must not do what no network can: end the client.
                logger.opt(exception=error).error("link {}: {!r}", index, error)
                await self._wait(backoff.delay(), index, error)
                continue
            loop = asyncio.get_running_loop()
            began = loop.time()
            await self._watch(index, link)
            if loop.time() - began > LONGEST_RETRY:
                backoff.reset()
            elif index < self._wanted:
                # Whoever is thrown out soon after each welcome must not dial in a rush.
                await asyncio.sleep(backoff.delay())

    async def _wait(self, delay: float, index: int, why: Exception) -> None:
        level = "WARNING" if index == 0 else "DEBUG"
        logger.log(level, "cannot reach the server at {}:{}: {}; next try in {:.1f} s",
                   self._config.host, self._config.port, why, delay)  # fmt: skip
        await asyncio.sleep(delay)

    async def _open(self, index: int) -> Link:
        """A link that the server has welcomed. Raises DialError, _TryLater and FinalRefusal."""
        config = self._config
        if self._authority is None and config.pin is not None:
            self._authority = await self._fetch_authority(config.pin)
        trust = ClientTrust(config.server_name, self._authority)
        link = await self._dial(trust)
        hello = Hello(
            version=VERSION,
            tunnel=self.tunnel,
            session=self._session,
            token=config.token,
            link=index,
            agent=f"quictunnel/{__version__}",
            capabilities=list(config.capabilities),
        )
        answer = await self._ask(link, hello)
        if link.closed is not None:
            # Its end came with the answer, and was told when nobody watched yet.
            raise DialError(f"the server closed the link: {link.closed}")
        match answer:
            case Welcome():
                try:
                    answer = _presentable(answer)
                except ValueError as error:
                    link.close(ErrorCode.FRAME_ERROR, "a welcome to nothing")
                    raise DialError(f"the server's welcome: {error}") from None
                self._links[index] = link
                self._welcome(answer)
                return link
            case Refuse(final=True):
                raise _final(answer)
            case Refuse():
                link.close()
                raise _TryLater(f"refused: {_line(answer.text)}", answer.retry_after)
            case _:
                link.close(ErrorCode.FRAME_ERROR, "no answer to hello")
                raise DialError(f"the server answered hello with {answer.type}")

    async def _dial(self, trust: ClientTrust) -> Link:
        link = await dial(
            self._engine, self._config.host, self._config.port, trust, self, self._budget, timeout=DIAL_TIME
        )
        if link.closed is not None:
            raise DialError(str(link.closed))
        self._closed[link] = asyncio.Event()
        self._open_links.add(link)
        return link

    async def _ask(self, link: Link, message: ControlMessage) -> ControlMessage:
        answer: asyncio.Future[ControlMessage] = asyncio.get_running_loop().create_future()
        self._answers[link] = answer
        link.send_control(message)
        try:
            async with asyncio.timeout(ANSWER_TIME):
                return await answer
        except TimeoutError:
            link.close(ErrorCode.REQUEST_TIMEOUT, "no answer on the control stream")
            raise DialError(f"the server did not answer within {ANSWER_TIME:g} s") from None
        except LinkClosed as why:
            raise DialError(f"the server closed the link: {why}") from None
        finally:
            self._answers.pop(link, None)

    async def _ask_for_certificates(self) -> Authority:
        """What the server says of its certificates.

        This link is not verified, and nothing but the question goes over it: a pin proves the answer or nothing is
        believed of it.
        """
        link = await self._dial(ClientTrust(self._config.server_name, None, verify=False))
        try:
            answer = await self._ask(link, Authority())
        finally:
            link.close()
        if not isinstance(answer, Authority):
            raise DialError(f"the server answered the question for its CA with {answer.type}")
        return answer

    async def _fetch_authority(self, pin: bytes) -> bytes:
        """The CA's certificate that the pin stands for; the next link is verified against it like any other."""
        answer = await self._ask_for_certificates()
        try:
            return pinned_authority(answer.certificate.encode(), pin, datetime.now(UTC))
        except TrustError as error:
            raise FinalRefusal("untrusted", str(error)) from None

    async def _why_untrusted(self, error: DialError) -> str:
        """What is wrong with the server's certificate: the QUIC libraries have one word for all that may be."""
        try:
            shown = (await self._ask_for_certificates()).server
            der = ssl.PEM_cert_to_DER_cert(shown[: shown.index("-----END CERTIFICATE-----") + 26])
        except (DialError, ValueError):
            return str(error)
        return diagnose(der, self._config.server_name, self._authority, datetime.now(UTC))

    async def _watch(self, index: int, link: Link) -> None:
        """Return when the link is closed, not wanted any more, or suspect."""
        closed = self._closed[link]
        while True:
            try:
                async with asyncio.timeout(PING_EVERY):
                    await closed.wait()
            except TimeoutError:
                pass
            if link.closed is not None:
                return
            if link.silent_for() > SUSPECT_AFTER:
                why = "nobody listens there" if link.refused else f"silent for {link.silent_for():.1f} s"
                logger.warning("= link {} to the server is suspect ({}): dialling beside it", index, why)
                closed.clear()
                return
            closed.clear()
            link.end_stalled()
            link.ping()

    # What links tell

    def link_control(self, link: Link, message: ControlMessage) -> None:
        match message:
            case Welcome() | Refuse() | Authority():
                answer = self._answers.get(link)
                if answer is not None and not answer.done():
                    answer.set_result(message)
                elif isinstance(message, Refuse):
                    self._refused(link, message)
            case Grow():
                self._grow(message.links)
            case Drain():
                logger.info("= the server is draining")
                link.draining = True
            case Hello() | Drained() | Health() | Unknown():
                logger.debug("< {!r}: unexpected {}", link, message.type)

    def link_request(self, link: Link, leg: StreamLeg, head: RequestHead) -> RequestHead:
        return self._fan_out.open_exchange(head, leg)

    def link_refused(self, link: Link) -> None:
        closed = self._closed.get(link)
        if closed is not None:
            closed.set()  # wakes its keeper, which looks how suspect it is

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        answer = self._answers.get(link)
        if answer is not None and not answer.done():
            answer.set_exception(why)
        closed = self._closed.pop(link, None)
        if closed is not None:
            closed.set()
        for index, each in list(self._links.items()):
            if each is link:
                del self._links[index]
        if self.serving and not self._links:
            self.serving = False
            if not self._stopping.is_set():
                logger.warning("= the connection to the server was lost: {}", why)

    def link_terminated(self, link: Link) -> None:
        self._open_links.discard(link)

    def _welcome(self, welcome: Welcome) -> None:
        # The name stays ours from now on, also if the server chose it.
        self.tunnel = welcome.tunnel
        first = not self.serving
        self.serving = True
        self.welcomed.set()
        if first:
            logger.info(
                "serving tunnel {} at {} from {}", welcome.tunnel, ", ".join(welcome.urls), self._fan_out.backend.name
            )
            if self._on_welcome is not None:
                self._on_welcome(welcome)

    def _refused(self, link: Link, refuse: Refuse) -> None:
        logger.error("= the server ended the session: {}", _line(refuse.text))
        # Its last word, whatever it adds: a server may say it as often as it likes.
        link.close()
        if refuse.final and self._group is not None and not self._stopping.is_set():
            self._stopping.set()
            self._group.create_task(self._give_up(_final(refuse)))

    async def _give_up(self, refusal: FinalRefusal) -> None:
        raise refusal

    def _grow(self, links: int) -> None:
        self._wanted = max(1, min(links, self._config.max_links))
        self._start_keepers()


# What a server says goes to terminals and to scripts that read them.


def _presentable(welcome: Welcome) -> Welcome:
    """The welcome with a name that is one, and of its URLs those that are a word. Raises ValueError."""
    words = [url for url in welcome.urls if url.isascii() and url.isprintable() and " " not in url]
    return replace(
        welcome, tunnel=normalise_tunnel_name(welcome.tunnel), urls=[url for url in words[:8] if len(url) <= _SHOWN]
    )


def _line(text: str) -> str:
    return escape(text[:_SHOWN])


def _final(refuse: Refuse) -> FinalRefusal:
    return FinalRefusal(_line(refuse.code), _line(refuse.text))
