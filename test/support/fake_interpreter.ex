defmodule VLLM.FakeInterpreter do
  @moduledoc """
  A program that stands for Python in the tests of the set-up: it tells a version,
  makes environments that hold only itself, notes how it is called, and lets pip
  do what a fragment of shell says. The guard it runs as a Python does.
  """

  @doc """
  Writes the program into `folder` and returns its path.

  `:version` is what it tells; `:libraries`, `:venv` and `:pip` are run in its
  place when it is asked to load a shared library, to make an environment or to
  install packages. In them, `$*` has the arguments.
  """
  @spec write!(Path.t(), keyword()) :: Path.t()
  def write!(folder, opts \\ []) do
    path = Path.join(folder, "python")
    {:ok, python} = VLLM.Python.executable()

    File.write!(path, """
    #!/bin/sh
    echo "$*" >> "#{calls_file(folder)}"
    case "$*" in
      "-I -S "*guard.py*) exec "#{python}" "$@" ;;
      *ctypes*) #{Keyword.get(opts, :libraries, ":")} ;;
      *sys.version_info*) echo #{Keyword.get(opts, :version, "3.12.4")} ;;
      "-m venv "*)
        #{Keyword.get(opts, :venv, ~s[mkdir -p "$3/bin" && ln -s "#{path}" "$3/bin/python" && touch "$3/pyvenv.cfg"])}
        ;;
      "-m pip install "*)
        #{Keyword.get(opts, :pip, ":")}
        ;;
    esac
    """)

    File.chmod!(path, 0o755)
    path
  end

  @doc """
  Writes a Python into `folder` that runs guards as ever, and in place of workers a line of shell;
  returns its path.
  """
  @spec with_worker!(Path.t(), String.t()) :: Path.t()
  def with_worker!(folder, line) do
    path = Path.join(folder, "python")
    python = VLLM.TestPython.executable!()

    File.write!(path, """
    #!/bin/sh
    case "$1" in
      -m) #{line} ;;
      *) exec "#{python}" "$@" ;;
    esac
    """)

    File.chmod!(path, 0o755)
    path
  end

  @doc "How the program in `folder` has been called, oldest first."
  @spec calls(Path.t()) :: [String.t()]
  def calls(folder) do
    case File.read(calls_file(folder)) do
      {:ok, text} -> String.split(text, "\n", trim: true)
      {:error, :enoent} -> []
    end
  end

  defp calls_file(folder), do: Path.join(folder, "calls")
end
