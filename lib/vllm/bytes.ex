defmodule VLLM.Bytes do
  @moduledoc false
  # Sizes as people read them: of files in powers of a thousand, as the hub and
  # disks count, and of memory in powers of 1024, as vLLM does.

  @files [{1.0e12, "TB"}, {1.0e9, "GB"}, {1.0e6, "MB"}, {1.0e3, "kB"}]

  @doc """
  The size of files; a question mark where it is not known.

      iex> Enum.map([nil, 999, 1_500, 4_100_000_000], &VLLM.Bytes.file/1)
      ["?", "999 B", "1.5 kB", "4.1 GB"]
  """
  @spec file(number() | nil) :: String.t()
  def file(nil), do: "?"

  def file(bytes) do
    {factor, unit} = unit(bytes)
    "#{in_unit(bytes, factor)} #{unit}"
  end

  @doc """
  The size of a part of files and of the whole, both in the unit of the whole.

      iex> VLLM.Bytes.part(300_000_000, 4_100_000_000)
      "0.3 of 4.1 GB"
  """
  @spec part(number(), number()) :: String.t()
  def part(bytes, total) do
    {factor, unit} = unit(total)
    "#{in_unit(bytes, factor)} of #{in_unit(total, factor)} #{unit}"
  end

  @doc """
  A number of bytes in memory in GiB, or in MiB or KiB where it is less than one.

      iex> Enum.map([nil, 131_072, 8_300_000, 16_060_522_496], &VLLM.Bytes.memory/1)
      ["?", "128.0 KiB", "7.9 MiB", "15.0 GiB"]
  """
  @spec memory(number() | nil) :: String.t()
  def memory(nil), do: "?"
  def memory(bytes) when bytes < 0x10_0000, do: "#{decimal(bytes / 0x400)} KiB"
  def memory(bytes) when bytes < 0x4000_0000, do: "#{decimal(bytes / 0x10_0000)} MiB"
  def memory(bytes), do: "#{decimal(bytes / 0x4000_0000)} GiB"

  defp unit(bytes), do: Enum.find(@files, {1, "B"}, fn {factor, _unit} -> bytes >= factor end)

  defp in_unit(bytes, 1), do: round(bytes)
  defp in_unit(bytes, factor), do: decimal(bytes / factor)

  defp decimal(number), do: :erlang.float_to_binary(number, decimals: 1)
end
