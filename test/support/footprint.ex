defmodule VLLM.Footprint do
  @moduledoc """
  What the BEAM and the processes below it hold: to find out whether anything is left of an engine,
  and whether anything grows while one serves.
  """

  import VLLM.OSProcess, only: [alive?: 1, children: 1, command: 1, descendants: 1]

  @doc "What this BEAM holds now."
  def take do
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)

    %{
      processes: length(Process.list()),
      ets_tables: length(:ets.all()),
      ets_memory: :erlang.memory(:ets),
      ports: length(Port.list()),
      atoms: :erlang.system_info(:atom_count),
      memory: :erlang.memory(:total),
      fds: fds(beam()),
      programs: programs(),
      run_folders: run_folders()
    }
  end

  @doc """
  What there is more of than in `before`, once that has stopped to shrink: an empty list where
  everything is back. Memory and atoms may be more by as much as `allowed` says.
  """
  def left(before, allowed, timeout \\ 10_000) do
    VLLM.OSProcess.eventually(fn -> grown(before, allowed) == [] end, timeout)
    grown(before, allowed)
  end

  defp grown(before, allowed) do
    now = take()

    for name <- Map.keys(before),
        more = more(before[name], now[name], Map.get(allowed, name, 0)),
        do: {name, more}
  end

  defp more(before, now, _allowed) when is_list(now) do
    if now -- before != [], do: now -- before
  end

  defp more(before, now, allowed), do: if(now > before + allowed, do: now - before)

  @doc "The processes below this BEAM, but for nurseries, which stay: those that engines have."
  def engine_processes do
    below = descendants(beam())
    nurseries = for pid <- below, command(pid) =~ "\0--alone\0", do: [pid | children(pid)]
    below -- List.flatten(nurseries)
  end

  @doc "The guards of the engines of this BEAM, the oldest first."
  def guards do
    below = descendants(beam())
    guards = for run <- run_folders(), do: guard(Path.join(base_dir(), run))
    nursery? = &(command(&1) =~ "\0--alone\0")
    guards |> Enum.filter(&(&1 in below and not nursery?.(&1))) |> Enum.sort()
  end

  @doc "The guard of a run; a nursery's is another process than the port's. 0 where there is none."
  def guard(run_dir) do
    case read(Path.join(run_dir, "lock")) do
      "vllm_bridge " <> pid -> pid |> String.trim() |> String.to_integer()
      "" -> 0
    end
  end

  @doc "The processes of a run by what they are: `:guard`, `:worker`, `:engine_core`, `:rank`, `:helper`."
  def roles(guard) do
    [{:guard, guard} | for(pid <- descendants(guard), do: {role(pid), pid})]
  end

  defp role(pid) do
    title = String.trim(read("/proc/#{pid}/comm"))

    cond do
      title =~ "EngineCore" or title =~ "VLLM::EngineCor" -> :engine_core
      title =~ "VLLM::Worker" -> :rank
      # Also what the guard has forked and not yet become another program.
      command(pid) =~ ~r/guard.py\0|^vllm_bridge\0/ -> :helper
      command(pid) =~ ~r/-m\0vllm_bridge\0|fake_worker/ -> :worker
      true -> :helper
    end
  end

  @doc "The memory in use by a process, in bytes; 0 if it is gone."
  def resident(pid) do
    case Regex.run(~r/VmRSS:\s+(\d+) kB/, read("/proc/#{pid}/status")) do
      [_, kilobytes] -> 1024 * String.to_integer(kilobytes)
      nil -> 0
    end
  end

  @doc "How many files, pipes and sockets a process has open."
  def fds(pid) do
    case File.ls("/proc/#{pid}/fd") do
      {:ok, names} -> length(names)
      {:error, _} -> 0
    end
  end

  @doc "The shared memory segments and semaphores that processes have mapped."
  def segments(pids) do
    for pid <- pids,
        [_, name] <- Regex.scan(~r/\/dev\/shm\/(\S+)/, read("/proc/#{pid}/maps")),
        uniq: true,
        do: name
  end

  @doc "The process of this BEAM."
  def beam, do: String.to_integer(System.pid())

  # Also those that have lost their parents: each carries the name of its run.
  defp programs do
    tag = "EX_VLLM_RUN=" <> base_dir()

    tagged =
      for entry <- File.ls!("/proc"),
          {pid, ""} <- [Integer.parse(entry)],
          read("/proc/#{pid}/environ") =~ tag,
          do: pid

    Enum.filter(Enum.uniq(tagged ++ descendants(beam())), &alive?/1) |> Enum.sort()
  end

  defp run_folders do
    case File.ls(base_dir()) do
      {:ok, names} -> Enum.sort(names)
      {:error, _} -> []
    end
  end

  defp base_dir, do: VLLM.Bridge.Program.base_dir()

  defp read(path) do
    case File.read(path) do
      {:ok, text} -> text
      {:error, _} -> ""
    end
  end
end
