defmodule VLLM.Bench.Processes do
  @moduledoc false
  # What the processes of an engine and of this BEAM take of the machine, as
  # Linux tells it. Elsewhere, and of engines without processes, nothing is known.

  alias VLLM.Engine.Table

  # In what Linux counts the CPU time of processes, whatever the kernel's own ticks are.
  @ticks_per_second 100

  @doc "The processes of an engine: of each replica its guard and all below it."
  @spec of(VLLM.engine()) :: [pos_integer()]
  def of(engine) do
    with {:ok, table, _pid} <- Table.lookup(engine) do
      for replica <- 1..Table.replicas(table),
          {%{run_dir: folder}, _conn} <- [Table.run(table, replica)],
          {:ok, "vllm_bridge " <> guard} <- [File.read(Path.join(folder, "lock"))],
          pid <- guard |> String.trim() |> String.to_integer() |> below(),
          do: pid
    else
      {:error, _gone} -> []
    end
  end

  @doc "A process and all below it."
  @spec below(pos_integer()) :: [pos_integer()]
  def below(pid), do: below([pid], parents())

  defp below([], _parents), do: []

  defp below(pids, parents),
    do: pids ++ below(for({pid, parent} <- parents, parent in pids, do: pid), parents)

  defp parents do
    with {:ok, names} <- File.ls("/proc") do
      for name <- names,
          {pid, ""} <- [Integer.parse(name)],
          [_state, parent | _] <- [stat(pid)],
          do: {pid, String.to_integer(parent)}
    else
      {:error, _elsewhere} -> []
    end
  end

  @doc "The seconds of CPU that processes have used so far."
  @spec cpu_seconds([pos_integer()]) :: float()
  def cpu_seconds(pids) do
    ticks =
      for pid <- pids, [_ | _] = fields <- [stat(pid)], field <- Enum.slice(fields, 11, 2) do
        String.to_integer(field)
      end

    Enum.sum(ticks) / @ticks_per_second
  end

  @doc "The same of this BEAM, with all that runs in it."
  @spec own_cpu_seconds() :: float()
  def own_cpu_seconds, do: elem(:erlang.statistics(:runtime), 0) / 1000

  # The name in parentheses may hold spaces and parentheses; what is after it.
  defp stat(pid) do
    case File.read("/proc/#{pid}/stat") do
      {:ok, text} -> text |> String.split(") ") |> List.last() |> String.split()
      {:error, _gone} -> []
    end
  end

  @doc "Bytes of memory of processes, where what they share counts once; nil where none is known."
  @spec memory([pos_integer()]) :: pos_integer() | nil
  def memory(pids) do
    kilobytes =
      for pid <- pids,
          {:ok, text} <- [File.read("/proc/#{pid}/smaps_rollup")],
          [_, kilobytes] <- [Regex.run(~r/^Pss:\s+(\d+) kB/m, text)],
          do: String.to_integer(kilobytes)

    if kilobytes != [], do: 1024 * Enum.sum(kilobytes)
  end
end
