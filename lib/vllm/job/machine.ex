defmodule VLLM.Job.Machine do
  @moduledoc false
  # What the machine has left for a step: memory and disk.

  alias VLLM.{Disk, Error}

  # What the two versions of control groups call the memory's hierarchy, below the folder that they
  # are mounted in and in /proc/self/cgroup, the limit, what is used, and what of that is page cache.
  @cgroups [
    {"", "memory.max", "memory.current", "file"},
    {"memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"}
  ]

  @doc """
  Bytes of memory that a process can still get without swapping, and how many there are in all: of
  the system, or of what its control group or one above it allows, whichever is least.

  `cgroups` is the folder that control groups are mounted in, `own` the file that names those of this
  process.
  """
  @spec memory(Path.t(), Path.t()) :: {available :: non_neg_integer(), total :: non_neg_integer()}
  def memory(cgroups \\ "/sys/fs/cgroup", own \\ "/proc/self/cgroup") do
    meminfo = File.read!("/proc/meminfo")
    system = {meminfo(meminfo, "MemAvailable"), meminfo(meminfo, "MemTotal")}

    for {hierarchy, limit, usage, cached} <- @cgroups,
        group <- groups(own, hierarchy),
        folder = Path.join([cgroups, hierarchy, group]),
        {available, total} <- allowed(folder, limit, usage, cached),
        reduce: system do
      {least, least_total} -> {min(available, least), min(total, least_total)}
    end
  end

  # All from the first to the own one. A container may see its own as the first, and be told of a
  # path that is not there.
  defp groups(own, hierarchy) do
    with {:ok, text} <- File.read(own),
         [_, path] <- Regex.run(~r/^\d+:#{hierarchy}:(.+)$/m, text) do
      path |> Path.split() |> Enum.scan(&Path.join(&2, &1))
    else
      _unknown -> ["/"]
    end
  end

  defp meminfo(text, name) do
    [_, kilobytes] = Regex.run(~r/^#{name}:\s+(\d+) kB/m, text)
    String.to_integer(kilobytes) * 1024
  end

  # Nothing where there is no limit. The page cache counts as used and is given back under pressure.
  defp allowed(folder, limit, usage, cached) do
    with {:ok, limit} <- number(Path.join(folder, limit)),
         {:ok, usage} <- number(Path.join(folder, usage)) do
      [{max(limit - usage + cached(folder, cached), 0), limit}]
    else
      _no_limit -> []
    end
  end

  defp number(file) do
    with {:ok, text} <- File.read(file), {number, _} <- Integer.parse(text), do: {:ok, number}
  end

  defp cached(folder, name) do
    with {:ok, text} <- File.read(Path.join(folder, "memory.stat")),
         [_, bytes] <- Regex.run(~r/^#{name} (\d+)$/m, text) do
      String.to_integer(bytes)
    else
      _unknown -> 0
    end
  end

  @doc "How many processes the system has killed for want of memory; nil where it does not tell."
  @spec killed() :: non_neg_integer() | nil
  def killed do
    with {:ok, text} <- File.read("/proc/vmstat"),
         [_, count] <- Regex.run(~r/^oom_kill (\d+)$/m, text) do
      String.to_integer(count)
    else
      _unknown -> nil
    end
  end

  @doc "Whether so many bytes fit on the disk with a folder."
  @spec check_disk(Path.t(), non_neg_integer()) :: :ok | {:error, Error.t()}
  def check_disk(folder, bytes) do
    case Disk.free(folder) do
      {:ok, free} when free < bytes -> {:error, disk_full(folder, bytes, free)}
      _enough_or_unknown -> :ok
    end
  end

  defp disk_full(folder, bytes, free) do
    message =
      "The disk with #{folder} has #{VLLM.Bytes.file(free)} left, and #{VLLM.Bytes.file(bytes)} are " <>
        "needed. Make room (`mix vllm.models` shows what models take), or name another folder: " <>
        "`config :ex_vllm, data_dir: \"…\"`. A retry goes on with what is not finished."

    Error.new(:disk_full, message, %{"path" => folder, "needed" => bytes, "free" => free})
  end
end
