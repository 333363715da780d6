defmodule VLLM.ErrorTest do
  use ExUnit.Case, async: true

  alias VLLM.Error

  test "an error of the wire has an atom that existed before" do
    assert %Error{reason: :prompt_too_long, message: "Too long.", details: %{"max" => 7}} =
             Error.from_wire(%{
               "reason" => "prompt_too_long",
               "message" => "Too long.",
               "details" => %{"max" => 7}
             })
  end

  test "an unknown reason is :internal and stays readable" do
    assert %Error{reason: :internal, details: %{"reason" => "from_the_future"}} =
             Error.from_wire(%{"reason" => "from_the_future", "message" => "?", "details" => nil})
  end

  test "what is no error is a protocol fault" do
    for wire <- ["text", 7, %{"message" => "no reason"}, %{"reason" => 1, "message" => "?"}] do
      assert %Error{reason: :protocol} = Error.from_wire(wire)
    end
  end

  test "reasons are named once" do
    names = Keyword.keys(Error.Reasons.all())
    assert names == Enum.uniq(names)
  end

  test "a traceback is for logs, and not for iex" do
    traceback = "Traceback:\n  File /home/me/x.py\n"
    details = %{"exception" => "KeyError", "traceback" => traceback}
    error = Error.new(:internal, "A fault.", details)
    shown = inspect(error)
    refute shown =~ "/home/me"
    assert shown =~ ~s|"traceback" => "(2 lines)"|
    assert shown =~ ~s("exception" => "KeyError")
    assert error.details == details
    assert inspect(Error.new(:internal, "A fault.")) =~ "%VLLM.Error{"
  end
end
