"""What `twolane` alone shows on a terminal. Each choice runs a command of its own, which Ctrl+C ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

from rich.console import Console

# Key, the command's words (None: leave), what it says in English and in Chinese.
CHOICES: tuple[tuple[str, tuple[str, ...] | None, str, str], ...] = (
    ("1", ("proxy",), "proxy, in this terminal", "在本终端启动代理"),
    ("2", ("prefill",), "prefill instance, in this terminal", "在本终端启动 prefill 实例"),
    ("3", ("decode",), "decode instance, in this terminal", "在本终端启动 decode 实例"),
    ("4", ("up",), "all, in the background", "在后台启动全部服务"),
    ("5", ("test",), "check and test what runs", "检查并测试正在运行的服务"),
    ("6", ("config",), "configuration", "查看配置"),
    ("7", ("status",), "status", "查看状态"),
    ("8", ("logs",), "logs", "查看日志"),
    ("9", ("down",), "stop all", "停止全部服务"),
    ("0", None, "leave", "退出"),
)
WORDS = {
    "en": (
        "TwoLane: prefill and decode in two lanes",
        "Your choice: ",
        "{!r} is none of the choices: 0 to 9",
        "exit code",
    ),
    # ruff: noqa: RUF001 - Chinese has its own colon
    "zh": ("TwoLane：prefill 与 decode 双车道推理", "请选择：", "没有选项 {!r}：请输入 0 到 9", "退出码"),
}
LEAVE_WORDS = {"q", "quit", "exit"}


def language(env: Mapping[str, str]) -> str:
    """`zh` for zh_* locales, else `en`. POSIX: the first of these that isn't empty counts."""
    locale = next((env[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(name)), "")
    return "zh" if locale.startswith("zh") else "en"


def lines(lang: str) -> list[str]:
    """Pure: the menu, narrow enough for 80 columns."""
    chinese = lang == "zh"
    return [WORDS[lang][0], *(f"  {key}  {zh if chinese else en}" for key, _, en, zh in CHOICES)]


def command_for(key: str) -> tuple[str, ...] | None:
    """KeyError for a key that isn't there; None to leave."""
    if key in LEAVE_WORDS:
        return None
    return {key: words for key, words, _, _ in CHOICES}[key]


def run_menu(console: Console, lang: str, ask: Callable[[str], str] = input) -> None:
    """Until 0, the end of input, or Ctrl+C at the prompt."""
    _, prompt, wrong, exit_words = WORDS[lang]
    while True:
        console.print("\n" + "\n".join(lines(lang)), markup=False)
        try:
            key = ask(prompt).strip().lower()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not key:
            continue
        try:
            words = command_for(key)
        except KeyError:
            console.print(wrong.format(key), markup=False)
            continue
        if words is None:
            return
        if code := run_command(words):
            console.print(f"({exit_words} {code})", markup=False)


def run_command(words: tuple[str, ...]) -> int:
    """`twolane WORDS` on this terminal. Ctrl+C is for it alone, and the menu comes back."""
    old = signal.signal(signal.SIGINT, _ignore)
    try:
        return subprocess.run([sys.executable, "-m", "twolane.cli", *words], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, old)


def _ignore(*_: object) -> None:
    """A handler, not SIG_IGN, which children would inherit."""
