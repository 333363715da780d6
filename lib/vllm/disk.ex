defmodule VLLM.Disk do
  @moduledoc false
  # What is free on a disk.

  @doc "Bytes that are free for this user on the disk that a folder is on."
  @spec free(Path.t()) :: {:ok, non_neg_integer()} | :error
  def free(folder) do
    # As POSIX has it: a line for each file system, its free blocks in the fourth column.
    with df when df != nil <- System.find_executable("df"),
         {text, 0} <- System.cmd(df, ["-Pk", folder], stderr_to_stdout: true),
         [_titles, line | _] <- String.split(text, "\n"),
         [_, _, _, blocks | _] <- String.split(line),
         {blocks, ""} <- Integer.parse(blocks) do
      {:ok, blocks * 1024}
    else
      _ -> :error
    end
  end
end
