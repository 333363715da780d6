defmodule VLLM.Web.Machine do
  @moduledoc false
  # What this machine has, and what engines take of it. It starts programs of the
  # system and reads /proc, which is nothing for every second.

  alias VLLM.Bench.Processes
  alias VLLM.{Data, Disk}
  alias VLLM.Engine.{Config, Table}
  alias VLLM.Job

  @type device :: %{
          index: String.t(),
          name: String.t(),
          memory_bytes: pos_integer(),
          memory_used_bytes: non_neg_integer()
        }

  @type t :: %{
          memory_bytes: non_neg_integer(),
          memory_available_bytes: non_neg_integer(),
          disk_free_bytes: non_neg_integer() | nil,
          devices: [device()]
        }

  @doc "The machine as it is now; the disk is that with what is made here."
  @spec now() :: t()
  def now do
    {available, total} = Job.Machine.memory()

    %{
      memory_bytes: total,
      memory_available_bytes: available,
      disk_free_bytes: disk_free(),
      devices: devices()
    }
  end

  # Of a folder that has not been made yet, the one above it that is there.
  defp disk_free do
    folders = Data.dir() |> Path.split() |> Enum.scan(&Path.join(&2, &1)) |> Enum.reverse()

    case folders |> Enum.find("/", &File.dir?/1) |> Disk.free() do
      {:ok, bytes} -> bytes
      :error -> nil
    end
  end

  @query ~w(--query-gpu=index,name,memory.total,memory.used --format=csv,noheader,nounits)

  # None where NVIDIA's program is not there, or says something else.
  defp devices do
    with path when path != nil <- System.find_executable("nvidia-smi"),
         {text, 0} <- System.cmd(path, @query, stderr_to_stdout: true) do
      read_devices(text)
    else
      _none -> []
    end
  end

  @doc """
  What `nvidia-smi` tells, of a device in each line and in MiB.

      iex> VLLM.Web.Machine.read_devices("0, NVIDIA H200, 143771, 1000\\nNo devices\\n")
      [%{index: "0", name: "NVIDIA H200", memory_bytes: 150754820096, memory_used_bytes: 1048576000}]
  """
  @spec read_devices(String.t()) :: [device()]
  def read_devices(text) do
    for line <- String.split(text, "\n"),
        [index, name, total, used] <- [String.split(line, ", ")],
        {total, _} <- [Integer.parse(total)],
        {used, _} <- [Integer.parse(used)] do
      %{
        index: index,
        name: name,
        memory_bytes: total * 0x10_0000,
        memory_used_bytes: used * 0x10_0000
      }
    end
  end

  @doc "The memory that an engine has a part in: its devices', or the machine's."
  @spec of_engine(term(), Table.t(), t()) :: [
          %{device: String.t(), used_bytes: non_neg_integer() | nil, total_bytes: pos_integer()}
        ]
  def of_engine(engine, table, machine) do
    if Table.info(table)["device"] == "cuda",
      do: of_devices(table, machine),
      else: of_processes(engine, machine)
  rescue
    # Not all is known before the first start is over, and nothing after the end.
    ArgumentError -> []
  end

  # All that is used of a device: whose it is nobody tells.
  defp of_devices(table, machine) do
    replicas = 1..Table.replicas(table)
    given = Enum.flat_map(replicas, &(Config.devices(Table.config(table, &1), &1) || []))
    given = Enum.map(given, &to_string/1)

    for device <- machine.devices, given == [] or device.index in given do
      %{
        device: device.name,
        used_bytes: device.memory_used_bytes,
        total_bytes: device.memory_bytes
      }
    end
  end

  defp of_processes(engine, machine) do
    case engine |> Processes.of() |> Processes.memory() do
      nil -> []
      bytes -> [%{device: "cpu", used_bytes: bytes, total_bytes: machine.memory_bytes}]
    end
  end
end
