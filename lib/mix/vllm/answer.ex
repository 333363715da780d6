defmodule Mix.Vllm.Answer do
  @moduledoc false
  # What a task does with the answer to its question: prints it, or writes it to a file.

  alias VLLM.{Error, JSON, Plot, Terminal}

  @doc "What was answered; an error is printed, and the task ends with status 1."
  @spec ok!({:ok, answer} | {:error, Error.t()}) :: answer when answer: term()
  def ok!({:ok, answer}), do: answer

  def ok!({:error, error}) do
    Mix.shell().error(error.message)
    exit({:shutdown, 1})
  end

  @doc "What `ask` is answered, which imports vLLM; it is said so while one waits, but for `--json`."
  @spec of_vllm!([String.t()], (() -> {:ok, answer} | {:error, Error.t()})) :: answer
        when answer: term()
  def of_vllm!(flags, ask) do
    shown? = if "json" in flags, do: false
    shown? |> Terminal.waiting("vLLM is asked, which may take half a minute …", ask) |> ok!()
  end

  @doc "Prints an answer by `print`, or with `--json` all of it as JSON."
  @spec print(answer, [String.t()], (answer -> term())) :: :ok when answer: term()
  def print(answer, flags, print) do
    if "json" in flags, do: Mix.shell().info(JSON.encode(answer)), else: print.(answer)
    :ok
  end

  @doc """
  Ends the task unless a file can be written where `--option` says, which is like `example`. It is
  asked before anything is done, after which it would be too late. Nil where the option was not given.
  """
  @spec check_file!(term(), String.t(), String.t()) :: :ok
  def check_file!(nil, _option, _example), do: :ok

  def check_file!(path, option, example) do
    unless is_binary(path), do: Mix.raise("--#{option} takes a file: `--#{option} #{example}`")

    unless File.dir?(Path.dirname(path)),
      do: Mix.raise("#{path} cannot be written: there is no folder #{Path.dirname(path)}")

    :ok
  end

  @doc """
  Ends the task unless a picture can be written where `--plot` says, and drawn by the Python of `options`.
  """
  @spec check_picture!(term(), String.t(), map()) :: :ok
  def check_picture!(nil, _example, _options), do: :ok

  def check_picture!(path, example, options) do
    check_file!(path, "plot", example)
    _empty = "" |> Plot.draw([], how(path, options)) |> ok!()
    :ok
  end

  @doc """
  Draws a picture by the Python of `options` and writes it where `--plot` says, or ends the task. The name
  of the file says of which kind it is. Nil where the option was not given.
  """
  @spec picture!(String.t() | nil, map(), (map() -> {:ok, binary()} | {:error, Error.t()})) :: :ok
  def picture!(nil, _options, _draw), do: :ok

  def picture!(path, options, draw) do
    picture = path |> how(options) |> draw.() |> ok!()
    write!(path, picture)
  end

  defp how(path, options) do
    format = path |> Path.extname() |> String.trim_leading(".") |> String.downcase()
    options |> Map.take(["python"]) |> Map.put("format", format)
  end

  @doc "Writes a file, or ends the task."
  @spec write!(String.t(), binary()) :: :ok
  def write!(path, content) do
    with {:error, reason} <- File.write(path, content),
         do: Mix.raise("#{path} cannot be written: #{:file.format_error(reason)}")
  end
end
