defmodule VLLM.Python.Stamp do
  @moduledoc false
  # The file by which a virtual environment tells what `mix vllm.setup` has put
  # into it: made before anything is installed, and `:ready` only after all of it
  # is. An environment without one was made by somebody else.

  @file_name "ex_vllm.stamp"

  defstruct state: nil, lock: nil, test: nil, extras: %{}

  @typedoc """
    * `:state` - `nil` without a stamp
    * `:lock`, `:test` - hashes of the installed locks; `nil` where not installed
    * `:extras` - hashes of the locks of the installed extras, by name
  """
  @type t :: %__MODULE__{
          state: :installing | :ready | nil,
          lock: String.t() | nil,
          test: String.t() | nil,
          extras: %{String.t() => String.t()}
        }

  @spec read(Path.t()) :: t()
  def read(venv) do
    with {:ok, text} <- File.read(Path.join(venv, @file_name)),
         fields = Map.new(String.split(text, "\n", trim: true), &field/1),
         %{"state" => state} when state in ["installing", "ready"] <- fields do
      %__MODULE__{
        state: if(state == "ready", do: :ready, else: :installing),
        lock: fields["lock"],
        test: fields["test"],
        extras: for({"extra:" <> name, hash} <- fields, hash != nil, into: %{}, do: {name, hash})
      }
    else
      _ -> %__MODULE__{}
    end
  end

  defp field(line) do
    case String.split(line, " ", parts: 2) do
      [name, value] -> {name, value}
      [name] -> {name, nil}
    end
  end

  @spec write(Path.t(), t()) :: :ok | {:error, File.posix()}
  def write(venv, %__MODULE__{} = stamp) do
    fields = [state: stamp.state, lock: stamp.lock, test: stamp.test]
    extras = for {name, hash} <- stamp.extras, do: {"extra:" <> name, hash}
    lines = for {name, value} <- fields ++ extras, value != nil, do: "#{name} #{value}\n"
    path = Path.join(venv, @file_name)

    with :ok <- File.write(path <> ".new", lines), do: File.rename(path <> ".new", path)
  end

  @doc "Whether the environment is complete and its interpreter is still there."
  @spec ready?(Path.t()) :: boolean()
  def ready?(venv) do
    read(venv).state == :ready and System.find_executable(Path.join(venv, "bin/python")) != nil
  end

  @doc "A fingerprint of a lock, to tell one from another."
  @spec hash(Path.t()) :: String.t()
  def hash(file) do
    file |> File.read!() |> :erlang.md5() |> Base.encode16(case: :lower)
  end
end
