defmodule VLLM.Network do
  @moduledoc """
  A network of its own for BEAMs: namespaces of Linux that one switch joins, each by a link that can be
  cut, slow, late and lossy (`switch.py`). Needs root and `/dev/net/tun`.
  """

  use GenServer

  @switch Path.expand("switch.py", __DIR__)

  @patience 60_000

  @doc "Whether this machine lets us make one."
  def possible? do
    # Its input ends at once.
    arguments = ["-c", "true | \"$0\" \"$@\"", python(), @switch, name(), "1"]
    match?({_, 0}, System.cmd("sh", arguments, stderr_to_stdout: true))
  end

  defp python, do: VLLM.TestPython.executable!()
  defp name, do: "vllm-#{Base.encode16(:rand.bytes(3))}-"

  @doc "Makes one of `count` namespaces, which is gone with the calling process."
  def start_link(count) do
    name = name()
    {:ok, pid} = GenServer.start_link(__MODULE__, {name, count})
    {pid, name}
  end

  @doc """
  Has the link of the n-th be so, until it is told otherwise: `up: 0`, `delay:` in seconds and each direction,
  `loss:` as a share of the packets, `rate:` in bytes per second; without any as at the beginning.
  """
  def link({pid, _name}, n, settings \\ []),
    do: GenServer.call(pid, {:link, n, settings}, @patience)

  @doc "The address of the n-th."
  def address(n), do: {10, 77, 0, n}

  @doc "What a command is to be preceded by to run in the n-th."
  def command({_pid, name}, n), do: ["ip", "netns", "exec", "#{name}#{n}"]

  @impl true
  def init({name, count}) do
    port =
      Port.open({:spawn_executable, python()}, [
        :binary,
        :exit_status,
        line: 80,
        args: [@switch, name, "#{count}"]
      ])

    await(port, "ready")
    {:ok, port}
  end

  @impl true
  def handle_call({:link, n, settings}, _from, port) do
    settings = for {key, value} <- settings, do: " #{key}=#{value}"
    true = Port.command(port, ["#{n}", settings, "\n"])
    {:reply, await(port, "done"), port}
  end

  @impl true
  def handle_info({port, {:exit_status, status}}, port), do: {:stop, {:switch, status}, port}

  defp await(port, line) do
    receive do
      {^port, {:data, {:eol, ^line}}} -> :ok
      {^port, {:exit_status, status}} -> exit({:switch, status})
    end
  end
end
