defmodule VLLM.SecondBeam do
  @moduledoc """
  A BEAM of its own, in a process of the operating system, with the library in it: to be killed.

  All that it starts, and what is left of that, is told from what else runs on the machine by the
  folder that is its TMPDIR: run folders are made in it, and its name is in the environment of
  every process and in the names of what the fake worker makes in shared memory.
  """

  import ExUnit.Assertions
  import VLLM.OSProcess

  alias VLLM.Footprint

  @enforce_keys [:port, :os_pid, :folder, :shared_memory]
  defstruct @enforce_keys

  # Reads code, evaluates it and says so, until its input ends.
  @loop """
  Logger.configure(level: :none)
  {:ok, _} = Application.ensure_all_started(:ex_vllm)
  IO.puts("up")
  Enum.each(IO.stream(), fn line ->
    line |> String.trim() |> Base.decode64!() |> Code.eval_string()
    IO.puts("done")
  end)
  System.halt(0)
  """

  # What starts must start on a machine that is busy.
  @patience 120_000

  @doc "Starts one and returns when it is up; it is gone at the end of the test."
  def start do
    beam = open(fn paths -> ["elixir" | paths] ++ ["-e", @loop] end)
    await(beam, "up")
    beam
  end

  @doc "Starts `iex` on a terminal, to which `send_text/2` writes; ends like `start/0`."
  def start_iex do
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    beam = open(fn paths -> ["python3", "-c", spawn, "iex" | paths] end)
    await_text(beam, "iex(1)>")
    beam
  end

  defp open(command) do
    folder = Path.join("/tmp", "vllm-" <> Base.url_encode64(:rand.bytes(9), padding: false))
    File.mkdir!(folder)
    [program | args] = command.(Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)]))
    before = File.ls!("/dev/shm")

    port =
      Port.open({:spawn_executable, System.find_executable(program)}, [
        :binary,
        :exit_status,
        :stderr_to_stdout,
        args: args,
        env: [{'TMPDIR', to_charlist(folder)}, {'TERM', 'dumb'}]
      ])

    {:os_pid, os_pid} = Port.info(port, :os_pid)
    beam = %__MODULE__{port: port, os_pid: os_pid, folder: folder, shared_memory: before}

    ExUnit.Callbacks.on_exit({__MODULE__, folder}, fn ->
      for pid <- processes(beam), do: signal("KILL", pid)
      File.rm_rf!(folder)
    end)

    beam
  end

  @doc "Has it evaluate code, without waiting for that."
  def cast(beam, code), do: send_text(beam, Base.encode64(code) <> "\n")

  @doc "Has it evaluate code and returns when it has."
  def call(beam, code) do
    cast(beam, code)
    await(beam, "done")
  end

  def send_text(beam, text), do: Port.command(beam.port, text)

  @doc "Returns when it has said a line."
  def await(beam, line), do: await_text(beam, line <> "\n")

  @doc "Returns when it has said a text, of which nothing that it says later is read here."
  def await_text(beam, text), do: assert(read_until(beam, text))

  defp read_until(%{port: port} = beam, text, before \\ "") do
    receive do
      {^port, {:data, data}} ->
        said = before <> data
        said =~ text or read_until(beam, text, said)

      {^port, {:exit_status, status}} ->
        flunk("the second BEAM ended with status #{status}, and said: #{before}")
    after
      @patience -> flunk("waited in vain for #{inspect(text)} after: #{before}")
    end
  end

  @doc "Its processes, which are all that carry the folder's name, itself included."
  def processes(beam), do: Enum.filter(pids(), &carries?(&1, beam.folder))

  @doc "The processes of its engines: guards and all that is below them."
  def engine_processes(beam) do
    base = Path.join(beam.folder, "ex_vllm-")
    Enum.filter(pids(), &carries?(&1, base))
  end

  @doc "The guard of its only engine; nil before it has begun."
  def guard(beam) do
    case runs(beam) -- nurseries(beam) do
      [run] -> Footprint.guard(run)
      [] -> nil
    end
  end

  defp runs(beam), do: Path.wildcard(Path.join(beam.folder, "ex_vllm-*/*"))

  defp nurseries(beam) do
    Enum.filter(runs(beam), &(command(Footprint.guard(&1)) =~ "\0--alone\0"))
  end

  defp pids do
    for entry <- File.ls!("/proc"), {pid, ""} <- [Integer.parse(entry)], do: pid
  end

  # By its environment or its arguments; and a Python process of an engine, which may have
  # overwritten both with its title, by the lifeline that it holds (see sitecustomize.py).
  defp carries?(pid, name) do
    Enum.any?(["environ", "cmdline"], fn file ->
      case File.read("/proc/#{pid}/#{file}") do
        {:ok, text} -> :binary.match(text, name) != :nomatch
        {:error, _} -> false
      end
    end) or Enum.any?(open_files(pid), fn {_fd, path} -> String.starts_with?(path, name) end)
  end

  defp open_files(pid) do
    with {:ok, fds} <- File.ls("/proc/#{pid}/fd") do
      for fd <- fds, {:ok, path} <- [File.read_link("/proc/#{pid}/fd/#{fd}")], do: {fd, path}
    else
      {:error, _} -> []
    end
  end

  @doc "Files, sockets and folders of its engines, but for the folder that all run folders are in."
  def files(beam) do
    for folder <- Path.wildcard(Path.join(beam.folder, "*"), match_dot: true),
        file <- [folder | Path.wildcard(Path.join(folder, "**"), match_dot: true)],
        file != Path.join(beam.folder, Path.basename(VLLM.Bridge.Program.base_dir())),
        do: file
  end

  @doc """
  Segments of shared memory that appeared since it started and that no process holds. Those of
  other engines on the machine are held.
  """
  def segments(beam) do
    new =
      for name <- File.ls!("/dev/shm") -- beam.shared_memory,
          path = Path.join("/dev/shm", name),
          {:ok, %{inode: inode}} <- [File.stat(path)],
          do: {inode, path}

    held = if new == [], do: [], else: Enum.flat_map(pids(), &held/1)
    for {inode, path} <- new, inode not in held, do: path
  end

  # By inode: a semaphore is mapped under another name than it has.
  defp held(pid) do
    mapped =
      case File.read("/proc/#{pid}/maps") do
        {:ok, maps} -> Regex.scan(~r"(\d+)\s+/dev/shm/", maps, capture: :all_but_first)
        {:error, _} -> []
      end

    opened =
      for {fd, "/dev/shm/" <> _} <- open_files(pid),
          {:ok, %{inode: inode}} <- [File.stat("/proc/#{pid}/fd/#{fd}")],
          do: inode

    Enum.map(mapped, fn [inode] -> String.to_integer(inode) end) ++ opened
  end

  @doc "What is left of its engines, and of itself and its nurseries unless it `:lives`."
  def leftovers(beam, :lives) do
    nurseries = nurseries(beam)
    guards = Enum.map(nurseries, &Footprint.guard/1)
    processes = engine_processes(beam) -- (guards ++ Enum.flat_map(guards, &children/1))
    files = Enum.reject(files(beam), &String.starts_with?(&1, nurseries))
    described(processes) ++ files ++ segments(beam)
  end

  def leftovers(beam, :gone), do: described(processes(beam)) ++ files(beam) ++ segments(beam)

  defp described(processes), do: Enum.map(processes, &{&1, command(&1)})

  @doc "Waits until nothing is left and returns after how many ms since `since` that was seen."
  def gone_after(beam, since, beam_is \\ :gone) do
    # Far more than the five seconds of the promise: how long it took is told, and the machine may
    # be busy. What counts is the last look: each takes seconds then, in which others come to hold what was nobody's.
    with false <- eventually(fn -> leftovers(beam, beam_is) == [] end, 30_000),
         [_ | _] = left <- leftovers(beam, beam_is),
         do: flunk("left over: #{inspect(left, pretty: true)}")

    System.monotonic_time(:millisecond) - since
  end
end
